"""Optimizers, their state as named tensors, and the learning rate's course over a training.

"The paper" is the official Transformer-VQ code; which of its rules hold here is said where they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vqlm.config import OPTIMIZERS, SCHEDULES, TrainConfig, require_known

FACTOR_FROM = 128
"""Adafactor factors a second moment only if its two largest dimensions are both at least this."""
MEAN_SQUARE_FLOOR = 1e-30
SCALE_FLOOR = 1e-3
UPDATE_LIMIT = 1.0

# Matrices [H, K] here and vectors [H K] in the paper's code, which decays no vectors.
_VECTORS_IN_THE_PAPER = ("content_bias", "position_bias")

Shape = tuple[int, ...]


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018) in the variant the paper trains with; no momentum.

    With t counted from 1 and b = 1 - t^-0.8, per parameter p of gradient g:

        V <- b V + (1 - b) (g^2 + 1e-30)        u = g / sqrt(V)
        p <- p - lr max(rms(p), 1e-3) u / max(1, rms(u))

    rms(p) is of p before this step, decay included.  Where the two largest dimensions are both at
    least 128, only means of V over each of them are kept, and V is their product over their mean.

    A class of our own, since others compute something else: ``torch.optim.Adafactor`` and the
    one in transformers factor every matrix, however small, and torch's limits the rate to
    1 / sqrt(t); timm's, after big_vision, does not scale by rms(p) and caps b at 0.999.

    Parameters without gradient are left alone.  State: ``step`` (on the CPU) and either
    ``mean_square`` (p's shape) or ``row`` and ``column`` (p's shape, the axis averaged over 1).
    Groups read ``lr``, ``weight_decay`` (times lr) and ``fixed_decay`` (not times lr).
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "fixed_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group["fixed_decay"] + group["lr"] * group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    update = self._update(p, p.grad) * (group["lr"] * _rms(p, SCALE_FLOOR))
                    p.mul_(1 - decay).sub_(update)
        return loss

    def _update(self, p: Tensor, grad: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            shapes = _adafactor_state(tuple(p.shape))
            state.update({name: torch.zeros(()) for name in shapes if name == "step"})
            state.update({name: p.new_zeros(s) for name, s in shapes.items() if name != "step"})
        state["step"] += 1
        share = float(state["step"]) ** -0.8
        square = grad.square() + MEAN_SQUARE_FLOOR
        if "mean_square" in state:
            mean_square = state["mean_square"].lerp_(square, share)
        else:
            second, first = _two_largest(tuple(p.shape))
            row = state["row"].lerp_(square.mean(first, keepdim=True), share)
            column = state["column"].lerp_(square.mean(second, keepdim=True), share)
            # Dividing first: where gradients vanish, the product of two floors would be 0.
            mean_square = row / row.mean(second, keepdim=True) * column
        update = grad * mean_square.rsqrt()
        return update / _rms(update, UPDATE_LIMIT)


def _rms(x: Tensor, floor: float) -> Tensor:
    return x.square().mean().sqrt().clamp(min=floor)


def _two_largest(shape: Shape) -> tuple[int, int]:
    """Axes of the second largest and the largest dimension; of equal ones the last is larger."""
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return axes[-2], axes[-1]


def _adafactor_state(shape: Shape) -> dict[str, Shape]:
    if len(shape) >= 2:
        second, first = _two_largest(shape)
        if shape[second] >= FACTOR_FROM:
            row, column = list(shape), list(shape)
            row[first] = column[second] = 1
            return {"step": (), "row": tuple(row), "column": tuple(column)}
    return {"step": (), "mean_square": shape}


# What each optimizer keeps for a parameter of a given shape.
_STATE: dict[str, Callable[[Shape], dict[str, Shape]]] = {
    "adamw": lambda shape: {"step": (), "exp_avg": shape, "exp_avg_sq": shape},
    "lion": lambda shape: {"exp_avg": shape},
    "adafactor": _adafactor_state,
}


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    official_decay: bool,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` of ``OPTIMIZERS`` over the parameters that require a gradient.

    Args:
        betas: AdamW's and Lion's two decays; the paper has (0.9, 0.98) and (0.95, 0.98).
            Adafactor has none.
        eps: AdamW's, outside the root; the paper has 1e-9.
        weight_decay: of each step.  Usually it is multiplied by the learning rate and applies to
            parameters of two or more dimensions.
        official_decay: as in the paper instead: ``weight_decay * p`` is subtracted whatever the
            learning rate (also if that is 0), from all but 1-dimensional leaves: also from the
            0-dimensional ``position_scale``, and not from ``content_bias`` and ``position_bias``,
            which are matrices here and vectors there (so the name decides, too).

    Lion is the package lion-pytorch; its momentum has the parameters' type (bfloat16 in the paper,
    where no experiment uses it).

    Raises:
        ValueError: an unknown name, a number out of range, no parameters, or Lion not installed.
    """
    require_known("optimizer", name, OPTIMIZERS)
    most = 1 if official_decay else math.inf
    for what, ok, wanted in [
        (f"learning_rate={learning_rate}", 0 < learning_rate < math.inf, "positive"),
        (f"betas={betas}", all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        (f"eps={eps}", 0 <= eps < math.inf, "0 or positive"),
        (f"weight_decay={weight_decay}", 0 <= weight_decay < most, f"0 or positive, below {most}"),
    ]:
        if not ok:
            raise ValueError(f"make_optimizer: {what}, but it must be {wanted}")
    groups: list[dict[str, Any]] = []
    named = [(key, p) for key, p in named_parameters if p.requires_grad]
    for decays in (True, False):
        decay = weight_decay if decays else 0.0
        chosen = [(key, p) for key, p in named if _decays(key, p, official_decay) == decays]
        scaled, fixed = (0.0, decay) if official_decay else (decay, 0.0)
        group = {"params": chosen, "weight_decay": scaled, "fixed_decay": fixed, "kind": name}
        groups += [group] * bool(chosen)
    if not groups:
        raise ValueError("make_optimizer: no parameter requires a gradient; give at least one")
    if name == "adafactor":
        return Adafactor(groups, learning_rate)
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    else:
        optimizer = _lion(groups, learning_rate, betas)
    optimizer.register_step_pre_hook(_apply_fixed_decay)
    return optimizer


def _decays(name: str, p: nn.Parameter, official: bool) -> bool:
    if official:
        return p.ndim != 1 and name.rpartition(".")[2] not in _VECTORS_IN_THE_PAPER
    return p.ndim >= 2


def _lion(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    try:
        from lion_pytorch import Lion
    except ImportError as error:
        raise ValueError(
            "the optimizer 'lion' needs lion-pytorch: pip install 'vqlm[train]', or choose "
            "another optimizer"
        ) from error
    return Lion(groups, lr=learning_rate, betas=betas)


def configured_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of ``model`` that ``config`` describes.

    Raises:
        ValueError: as ``make_optimizer``.
    """
    return make_optimizer(
        model.named_parameters(), name=config.optimizer, learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2), eps=config.adam_epsilon,
        weight_decay=config.weight_decay, official_decay=config.fixed_decay,
    )  # fmt: skip


@torch.no_grad()
def _apply_fixed_decay(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # Before the step rather than after: what AdamW and Lion subtract does not depend on p.
    for group in optimizer.param_groups:
        if group["fixed_decay"]:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["fixed_decay"])


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer of ``make_optimizer`` as "parameter name/state name" -> tensor.

    Not copied.  Complete from the start: parameters that had no gradient yet have zeros, which is
    what each of the optimizers begins with.
    """
    return {
        f"{name}/{key}": optimizer.state.get(p, {}).get(key, p.new_zeros(shape))
        for name, p, shapes in _parameters(optimizer)
        for key, shape in shapes.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what ``state_tensors`` gave, onto the parameters' device, bit for bit.

    ``optimizer`` may have made steps or none.  Learning rates, decays and betas stay as they are.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; nothing is changed then.
    """
    entries: list[dict[str, Tensor]] = []
    left_over = set(tensors)
    for name, _, shapes in _parameters(optimizer):
        for key, shape in shapes.items():
            full = f"{name}/{key}"
            if full not in tensors:
                raise ValueError(f"optimizer state: tensor {full!r} is missing")
            if (got := tuple(tensors[full].shape)) != shape:
                raise ValueError(f"optimizer state: {full!r} has shape {got}, not {shape}")
            left_over.remove(full)
        # Copies: the optimizer changes its state in place.
        entries.append({key: tensors[f"{name}/{key}"].clone() for key in shapes})
    if left_over:
        kind = optimizer.param_groups[0]["kind"]
        raise ValueError(f"optimizer state: {min(left_over)!r} has no place in this model's {kind}")
    # torch numbers the parameters in the order of their groups.
    state = dict(enumerate(entries))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[str, nn.Parameter, dict[str, Shape]]]:
    """Name, parameter, and the shapes of its state, in the order of the groups."""
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            yield name, p, _STATE[group["kind"]](tuple(p.shape))


def schedule(
    name: str,
    step: int,
    warmup_steps: int,
    share: float,
    *,
    final_rate: float = 0.1,
    from_zero: bool = False,
) -> float:
    """Factor on the peak learning rate at ``step`` (updates made so far): warm-up times descent.

    Warm-up is linear: (step + 1) / warmup_steps, at most 1; with ``from_zero``, as in the paper,
    step / warmup_steps, so that the first update has factor 0.  The descent, s = min(share, 1):

        "cosine"        f + (1 - f) (1 + cos(pi s)) / 2      f = final_rate
        "linear"        f + (1 - f) (1 - s)
        "inverse_sqrt"  sqrt(warmup_steps / steps counted as in the warm-up), from 1 downward; it
                        reads neither s nor f.  The paper's own rises to infinity; this is meant.
        "constant"      1

    ``share`` is the share of the descent that is behind, by steps, time or whatever limits the
    training; after 1 the factor stays at f.  The paper's is ``share_after_warmup``.

    Raises:
        ValueError: an unknown name, or a negative or undefined step, warmup_steps or share.
    """
    require_known("schedule", name, SCHEDULES)
    for what, value in (("step", step), ("warmup_steps", warmup_steps), ("share", share)):
        if not value >= 0:
            raise ValueError(f"schedule: {what}={value}, but it must be 0 or positive")
    count = step if from_zero else step + 1
    warm = min(1.0, count / warmup_steps) if warmup_steps else 1.0
    left = 1 - min(1.0, share)
    if name == "cosine":
        left = (1 + math.cos(math.pi * min(1.0, share))) / 2
    elif name == "inverse_sqrt":
        start = max(warmup_steps, 1)
        return warm * math.sqrt(start / max(start, count))
    elif name == "constant":
        return warm
    return warm * (final_rate + (1 - final_rate) * left)


def share_after_warmup(step: int, warmup_steps: int, max_steps: int) -> float:
    """(step - warmup_steps) / (max_steps - warmup_steps), limited to [0, 1]: the paper's share.

    Raises:
        ValueError: ``max_steps`` does not exceed ``warmup_steps``.
    """
    if max_steps <= warmup_steps:
        raise ValueError(
            f"share_after_warmup: max_steps={max_steps} must exceed warmup_steps={warmup_steps}"
        )
    return min(1.0, max(0.0, (step - warmup_steps) / (max_steps - warmup_steps)))
