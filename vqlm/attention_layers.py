"""The attention layers of other people's models: which they are, what they are called with, and
whether what is to take their place gives the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from vqlm.kept import evaluating

N_TRIED = 24
"""Tokens, at most, on which a replacement is compared with the original."""


class Unlike(ValueError):
    """A replacement that gives something else."""


def attention_modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute name) of each layer's attention, patched or not, in order.

    Raises:
        ValueError: no layers that look like those of Llama, Qwen or GPT-2.
    """
    found = [
        (module, name)
        for module in model.modules()
        for name, part in module.named_children()
        if name in ("self_attn", "attn") and hasattr(part, "layer_idx")
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layers that patch knows: it looks for "
            "'self_attn' or 'attn' with a layer_idx, as in Llama, Qwen and GPT-2"
        )
    return found


@torch.no_grad()
def attention_calls(
    model: nn.Module, tokens: Int[Tensor, "B T"]
) -> dict[int, tuple[dict[str, Any], Tensor]]:
    """What each attention layer of ``model`` is called with for ``tokens``, by name, and its
    output [B, T, D]; by ``layer_idx``."""
    calls: dict[int, tuple[dict[str, Any], Tensor]] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept = {name: kwargs.get(name) for name in ("position_embeddings", "attention_mask")}
        hidden = args[0] if args else kwargs["hidden_states"]
        calls[module.layer_idx] = ({"hidden_states": hidden, **kept}, output[0])

    hooks = [
        getattr(parent, name).register_forward_hook(note, with_kwargs=True)
        for parent, name in attention_modules(model)
    ]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def require_same(
    model: nn.Module, layers: list[Any], replacement: Callable[[Any], nn.Module]
) -> None:
    """Nothing, if ``replacement`` of each of ``layers`` gives what the layer gives, in float32.

    A family whose layers have the parts of one that is known may do something else with them.
    Where the model can't be run here and now, a warning says so instead.

    Raises:
        ValueError: one doesn't.
    """
    weight = next(model.parameters(), None)
    if weight is None or weight.is_meta or not isinstance(model, PreTrainedModel):
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with evaluating(model):
            calls = attention_calls(model, _some_tokens(model).to(weight.device))
        for layer in layers:
            _require_like(layer, *_wide(layer, calls[layer.layer_idx][0]), replacement)
    except Unlike:
        raise
    except Exception as error:  # whatever their code, hooks and kernels raise
        problem = " ".join(str(error).split())
        warnings.warn(f"patch can't compare layers with the originals: {problem}", stacklevel=3)
    finally:
        torch.set_float32_matmul_precision(precision)


def _some_tokens(model: Any) -> Int[Tensor, "1 T"]:
    most = getattr(model.config, "max_position_embeddings", None) or N_TRIED
    n_id = model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, 1 + min(N_TRIED, most))[None] % n_id


def _wide(layer: Any, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of ``layer``, and its arguments, in at least float32."""
    dtype = torch.promote_types(arguments["hidden_states"].dtype, torch.float32)

    def wide(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(wide(part) for part in x)
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return copy.deepcopy(layer).to(dtype).eval(), {k: wide(x) for k, x in arguments.items()}


def _require_like(
    layer: Any, original: Any, arguments: dict[str, Any], replacement: Callable[[Any], nn.Module]
) -> None:
    wanted = original(**arguments)[0]
    try:
        got = replacement(original).eval()(**arguments)[0]
    except (RuntimeError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise _unlike(layer, f"fails when it is patched ({problem})") from error
    difference = (got - wanted).norm()
    if not difference <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.norm():
        raise _unlike(layer, f"gives other outputs when it is patched (by {difference:.2g})")


def _unlike(layer: Any, how: str) -> Unlike:
    return Unlike(
        f"layer {layer.layer_idx}, a {type(layer).__name__}, {how}: it does more than patch knows "
        "of Llama-, Qwen- and GPT-2-style attention. Leave it out of layers"
    )
