"""Bringing a patched model's quality back: match layer by layer, then predict the next token.

First, every patched layer reads what the original layer reads, in the original model, and learns to
give the same outputs: all layers at once, one backward pass, nothing propagates from layer to
layer.  Then the whole patched model learns to predict the next token, as it was trained once.

    python: adapt(patched, original, windows, AdaptConfig(minutes=10))
    shell:  vqlm adapt MODEL --data FILE --out DIR mixer=ovq n_entry=64 minutes=10
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqlm.attention_layers import attention_calls
from vqlm.data import load_corpus
from vqlm.kept import evaluating
from vqlm.optimizers import schedule
from vqlm.patched_files import copy_tokenizer, load_original, save_patched
from vqlm.patching import PatchConfig, PatchedAttention, patch, patched_layers

HELD_OUT_WINDOWS = 200
"""Windows of the validation split that losses are measured on."""

Windows = Callable[[], Int[Tensor, "B T"]]
"""Gives the next batch: windows of text, one more token than is read."""


@dataclass(frozen=True)
class AdaptConfig:
    """Every number that decides how a patched model is adapted.

    Raises:
        ValueError: a value out of range.
    """

    minutes: float = 10.0
    """Minutes of both stages together."""
    matching: float = 0.3
    """Share of the time that goes to matching the layers' outputs."""
    batch_size: int = 8
    """Windows of text in one step."""
    seq_len: int = 256
    """Tokens of a window."""
    learning_rate: float = 1e-3
    """Peak learning rate of both stages; cosine, after a short warm-up."""
    commitment: float = 1e-2
    """Weight of |k - code|^2 ("vq")."""
    codebook_decay: float = 0.95
    """Decay of the codebooks' moving sums, per step ("vq")."""
    seed: int = 0
    """Of k-means ("vq")."""

    def __post_init__(self) -> None:
        for name in ("minutes", "batch_size", "seq_len", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdaptConfig: {name}={getattr(self, name)}; it must be positive")
        for name, most in (("matching", 1.0), ("codebook_decay", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"AdaptConfig: {name}={getattr(self, name)}; must be in [0, 1]")


def adapt(
    patched: nn.Module,
    original: nn.Module,
    windows: Windows,
    config: AdaptConfig,
    show: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Trains ``patched`` in place; ``original`` is the model as it was before ``patch``.

    ``clock``: seconds, of which ``config.minutes`` are spent; ``time.process_time`` counts those
    that this process computes, on a machine that others use too.
    Returns steps, and the last losses, of both stages.

    Raises:
        ValueError: nothing is patched.
    """
    layers = patched_layers(patched)
    if not layers:
        raise ValueError("adapt: the model has no patched layer; call vqlm.patch first")
    original.eval().requires_grad_(False)
    start_codebooks_(layers, original, windows()[:, :-1], config.seed)

    def match(batch: Tensor) -> Tensor:
        return matching_loss(layers, original, batch[:, :-1])

    def predict(batch: Tensor) -> Tensor:
        logits = patched(input_ids=batch[:, :-1], use_cache=False).logits
        wide = logits.flatten(0, 1).float()
        return F.cross_entropy(wide, batch[:, 1:].flatten())

    found: dict[str, Any] = {}
    patched.train()
    for name, loss, share in (
        ("matching", match, config.matching), ("next_token", predict, 1 - config.matching),
    ):  # fmt: skip
        parameters = layers if name == "matching" else [patched]
        steps, last = 0, None
        for steps, last in _stage(parameters, layers, loss, windows, config, share, clock):
            if steps % 50 == 0:
                show(f"{name}  step {steps}  {last:.4f}")
        found[name] = {"steps": steps, "last_loss": last}
    patched.eval()
    return found


def _stage(
    trained: list[Any],
    layers: list[PatchedAttention],
    loss: Callable[[Tensor], Tensor],
    windows: Windows,
    config: AdaptConfig,
    share: float,
    clock: Callable[[], float],
) -> Iterator[tuple[int, float]]:
    """Trains for ``share`` of the minutes; yields the number of steps and the loss after each."""
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98))
    seconds, began, step = 60 * config.minutes * share, clock(), 0
    while seconds and (done := (clock() - began) / seconds) < 1:
        rate = schedule("cosine", step, 20, done, final_rate=0.05)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        value = loss(windows())
        total = value + _commitment(layers, config)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers:
            if layer.seen is not None:
                layer.codebook.update_(layer.seen, config.codebook_decay, revive_below=0.1)
        step += 1
        yield step, value.item()


def _commitment(layers: list[PatchedAttention], config: AdaptConfig) -> Tensor | float:
    terms = [layer.commitment for layer in layers if layer.commitment is not None]
    n_token = config.batch_size * config.seq_len
    return config.commitment * torch.stack(terms).sum() / n_token if terms else 0.0


def matching_loss(
    layers: list[PatchedAttention], original: nn.Module, tokens: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean over ``layers`` of |output - original's|^2 / |original's|^2, for the same inputs."""
    inputs = attention_calls(original, tokens)
    losses = []
    for layer in layers:
        arguments, wanted = inputs[layer.layer_idx]
        got = layer(**arguments)[0]
        losses.append((got - wanted).square().sum() / wanted.square().sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def start_codebooks_(
    layers: list[PatchedAttention], original: nn.Module, tokens: Int[Tensor, "B T"], seed: int
) -> None:
    """Sets the codebooks, if there are any, to k-means centroids of the original's keys.

    Raises:
        ValueError: fewer tokens than codes.
    """
    if not any(hasattr(layer, "codebook") for layer in layers):
        return
    generator = torch.Generator().manual_seed(seed)
    calls = attention_calls(original, tokens)
    for layer in layers:
        arguments, _ = calls[layer.layer_idx]
        heads = layer.heads(arguments["hidden_states"], arguments["position_embeddings"])
        keys = heads.key.transpose(0, 1).flatten(1, 2)
        layer.codebook.initialize_(keys.to(layer.codebook.key_sum.dtype), generator)


def text_windows(tokens: Int[Tensor, " n"], config: AdaptConfig) -> Windows:
    """Windows of ``config.seq_len`` + 1 tokens, from places drawn anew for every batch.

    Raises:
        ValueError: fewer tokens than one window.
    """
    width = config.seq_len + 1
    if len(tokens) < width:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but a window has {width}; give more text or a "
            "smaller seq_len"
        )
    generator = torch.Generator().manual_seed(config.seed)

    def draw() -> Int[Tensor, "B T"]:
        most = len(tokens) - width + 1
        begin = torch.randint(most, (config.batch_size, 1), generator=generator)
        return tokens[begin + torch.arange(width)]

    return draw


@torch.no_grad()
def nats_per_token(model: nn.Module, windows: Int[Tensor, "W T"], batch_size: int = 16) -> float:
    """Mean cross-entropy over the windows, each read from its start; its last token is no input."""
    total = 0.0
    with evaluating(model):
        for part in windows.split(batch_size):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits.flatten(0, 1).float()
            total += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


def held_out(tokens: Int[Tensor, " n"], seq_len: int, n_window: int) -> Int[Tensor, "W T"]:
    """The first windows of ``tokens``, end to end, each with the token after it.

    Raises:
        ValueError: fewer tokens than one window.
    """
    n = min(n_window, (len(tokens) - 1) // seq_len)
    if n < 1:
        raise ValueError(f"{len(tokens)} tokens of held-out text, wanted more than {seq_len}")
    return torch.stack([tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(n)])


def recovered(original: float, patched: float, adapted: float) -> float:
    """What share of the loss that patching cost came back; above 1: better than the original."""
    return (patched - adapted) / (patched - original)


def run(
    model: Path,
    data: str,
    out: Path,
    patch_config: PatchConfig,
    config: AdaptConfig,
    layers: list[int] | None = None,
) -> dict[str, Any]:
    """Patches and adapts the model in a folder, and saves it; losses on held-out text.

    ``data``: a file or folder of text, in tokens of the folder's tokenizer, or bytes without one.

    Raises:
        ValueError: text or a model that can't be used.
    """
    corpus = load_corpus(data)
    original, encode = load_original(model)
    most = getattr(original.config, "n_positions", None)  # of models that learn positions
    if most is not None and config.seq_len > most:
        raise ValueError(f"seq_len={config.seq_len}, but {model} reads {most} tokens at most")
    train, validation = (encode(split.text()) for split in (corpus.train, corpus.validation))
    windows = held_out(validation, config.seq_len, HELD_OUT_WINDOWS)
    patched = copy.deepcopy(original)
    patch(patched, layers=layers, **dataclasses.asdict(patch_config))
    found: dict[str, Any] = {"original": nats_per_token(original, windows)}
    found["patched"] = nats_per_token(patched, windows)
    found |= adapt(patched, original, text_windows(train, config), config, lambda s: print(s))
    found["adapted"] = nats_per_token(patched, windows)
    save_patched(patched, out)
    copy_tokenizer(model, out)
    return found
