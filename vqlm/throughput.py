"""Time per token of training one attention layer: VQ against quadratic, by head type and length.

A layer is a whole mixer, projections and quantization included, forward and backward.  At each
length all kinds of attention run in turn, repetition by repetition in one process, so that whatever
else the machine does meets all of them.  Nothing is timed before the kinds of VQ-attention have
given equal outputs and gradients.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vqlm import bench_attention, timing
from vqlm.config import LMConfig
from vqlm.segments import Segments
from vqlm.softmax import SoftmaxAttention
from vqlm.vq import VQAttention
from vqlm.vq_parallel import REDUCTIONS, vq_attention_parallel

HEADS = ("shga", "mqa", "mha")
"""Head types: single-head gated (the paper's, values of width 2 D), multi-query, multi-head."""

VQ = ("serial", *REDUCTIONS)
"""VQ-attention by how it reduces its blocks: one after another, or all at once in two ways."""

ATTENTIONS = ("quadratic", *VQ)
"""Everything that is timed; quadratic is the softmax mixer."""

LENGTHS = bench_attention.LENGTHS[:6]
"""Default sequence lengths in tokens, 512 ... 16384."""

QUADRATIC_LIMIT = 4096
"""Default longest sequence, in tokens, at which quadratic attention is timed."""


def config_of(sizes: LMConfig, heads: str) -> LMConfig:
    """``sizes`` with its heads made ``heads``, one of ``HEADS``.

    Of ``sizes`` the number of heads and the width of values count for "mqa" and "mha" alone.
    """
    changes: dict[str, dict[str, Any]] = {
        "shga": {"layer": "gau", "n_head": 1, "n_kv_head": None, "d_v": 2 * sizes.d_model},
        "mqa": {"layer": "swiglu", "n_kv_head": 1},
        "mha": {"layer": "swiglu", "n_kv_head": None},
    }
    return dataclasses.replace(sizes, **changes[heads])


class Layers:
    """The two mixers of one config with equal projections, and an input for them."""

    def __init__(self, config: LMConfig, shape: tuple[int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.vq = VQAttention(config).to(dtype)
        self.softmax = SoftmaxAttention(config).to(dtype)
        self.softmax.project.load_state_dict(self.vq.project.state_dict())
        self.x = torch.randn(*shape, config.d_model, dtype=dtype, requires_grad=True)
        self.d_out = torch.randn(*shape, config.d_model, dtype=dtype)

    def leaves(self, attention: str) -> list[Tensor]:
        """What a pass gives gradients to."""
        mixer = self.softmax if attention == "quadratic" else self.vq
        return [self.x, *mixer.parameters()]

    def forward(self, attention: str) -> tuple[Float[Tensor, "B T D"], Tensor]:
        """Output and commitment loss of one of ``ATTENTIONS``, from the empty state."""
        if attention == "quadratic":
            return self.softmax(self.x)[0], self.x.new_zeros(())
        if attention == "serial":
            out, _, aux = self.vq(self.x)
            return out, aux.commitment
        mixer, config, (batch, n_token, _) = self.vq, self.vq.config, self.x.shape
        query, key, value, gate = mixer.project(self.x)
        codes = mixer.codebook.codes()
        keys = mixer.codebook(key, codes, Segments().valid(n_token, self.x.device))
        heads, _ = vq_attention_parallel(
            query, keys, value, codes, mixer.project.bias(), mixer.init_state(batch),
            block=config.block, cache_grad=config.cache_grad, reduction=attention,
        )  # fmt: skip
        return mixer.project.merge(heads, gate), keys.commitment

    def step(self, attention: str) -> tuple[Tensor, ...]:
        """The output and all gradients: what training a layer computes."""
        out, commitment = self.forward(attention)
        loss = (out * self.d_out).sum() + commitment
        return out, *torch.autograd.grad(loss, self.leaves(attention))


def check_equivalence() -> float:
    """Holds VQ-attention's kinds to each other, outputs and gradients, in float64.

    Returns the largest difference.  (The serial kind is held to the oracle by the tests.)

    Raises:
        RuntimeError: it is more than rounding.
    """
    sizes = LMConfig(d_model=8, n_head=2, d_k=6, d_v=5, n_code=7, window=6, block=4)
    worst = 0.0
    for heads in HEADS:
        layers = Layers(config_of(sizes, heads), (2, 19), torch.float64)
        want = layers.step("serial")
        for reduction in REDUCTIONS:
            pairs = zip(layers.step(reduction), want, strict=True)
            difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
            if not difference < 1e-9:
                raise RuntimeError(
                    f"throughput: {heads} by {reduction} differs from the serial loop by "
                    f"{difference:.3g} in float64, more than rounding; nothing was timed"
                )
            worst = max(worst, difference)
    return worst


def measure(
    config: LMConfig,
    seq_len: int,
    attentions: Sequence[str],
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of every repetition of each of ``attentions``, in float32, on one sequence."""
    layers = Layers(config, (1, seq_len), torch.float32)
    for attention in attentions:  # once to warm up
        layers.step(attention)
    seconds: dict[str, list[float]] = {attention: [] for attention in attentions}
    for _ in range(repeats):
        for attention in attentions:
            begin = clock()
            layers.step(attention)
            seconds[attention].append(clock() - begin)
    return seconds


def row_of(seconds: dict[str, list[float]], seq_len: int) -> dict[str, Any]:
    """``us_per_token``: lower quartile, median, upper quartile of each kind;
    ``quadratic_over``: how many times as long quadratic attention takes, and ``serial_over``: as
    the serial loop takes, each the median over pairs of neighbouring repetitions."""
    quartiles = {}
    for name, times in seconds.items():
        us = [1e6 * t / seq_len for t in times]
        found = statistics.quantiles(us, n=4, method="inclusive") if len(us) > 1 else us * 3
        quartiles[name] = [round(t, 3) for t in found]

    def over(name: str) -> dict[str, float]:
        if name not in seconds:
            return {}
        return {
            other: round(
                statistics.median(a / b for a, b in zip(seconds[name], times, strict=True)), 3
            )
            for other, times in seconds.items()
            if other != name and other != "quadratic"
        }

    return {
        "us_per_token": quartiles,
        "quadratic_over": over("quadratic"),
        "serial_over": over("serial"),
    }


def table(
    path: Path,
    sizes: LMConfig = bench_attention.SIZES,
    lengths: Sequence[int] = LENGTHS,
    *,
    quadratic_limit: int = QUADRATIC_LIMIT,
    repeats: int = timing.REPEATS,
    clock: str = "wall",
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Measures what ``path`` (JSON) doesn't hold yet; each row is written there at once.

    A row is one head type at one length: "heads", "seq_len", "settings" and ``row_of``.  It is
    measured again only if its settings are others now; rows of other lengths stay in the file.
    ``clock`` is one of ``timing.CLOCKS``.

    Raises:
        RuntimeError: kinds of VQ-attention are not equal.
        ValueError: no lengths or repeats, or a file that holds something else.
    """
    if repeats < 1 or not lengths or min(lengths) < 1:
        raise ValueError(
            f"throughput: got lengths={list(lengths)} and repeats={repeats}; "
            "want at least one length of at least one token, and at least one repeat"
        )
    known, checked, wanted = _read(path), False, []
    for heads in HEADS:
        config = config_of(sizes, heads)
        for seq_len in sorted(set(lengths)):
            attentions = ATTENTIONS if seq_len <= quadratic_limit else VQ
            settings = _settings(config, attentions, repeats, clock)
            row = known.get((heads, seq_len))
            if row is None or row["settings"] != settings:
                if not checked:
                    check_equivalence()
                    checked = True
                seconds = measure(config, seq_len, attentions, repeats, timing.CLOCKS[clock])
                row = {"heads": heads, "seq_len": seq_len, "settings": settings}
                row |= row_of(seconds, seq_len)
                known[heads, seq_len] = row
                write_json(path, {"rows": list(known.values())})
            report(row)
            wanted.append(row)
    return wanted


def _settings(
    config: LMConfig, attentions: Iterable[str], repeats: int, clock: str
) -> dict[str, Any]:
    """All that a time depends on, as JSON gives it back."""
    facts = {
        "model": dataclasses.asdict(config),
        "attentions": list(attentions),
        "repeats": repeats,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": f"{platform.processor() or platform.machine()} CPU",
    }
    same: dict[str, Any] = json.loads(json.dumps(facts))
    return same


def _read(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_bytes())["rows"]
        return {(row["heads"], row["seq_len"]): row for row in rows if row["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a throughput table; move it away ({error})") from error


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def header() -> str:
    """Headings of the lines that ``line`` makes."""
    times = "".join(f"{name:>11}" for name in ATTENTIONS)
    ratios = "".join(f"{name:>8}" for name in VQ)
    return (
        f"{'':14}us a token, median{'':{len(times) - 18}}quadratic over\n"
        f"heads  tokens {times}{ratios}"
    )


def line(row: dict[str, Any]) -> str:
    """One row of the printed table; "-" where quadratic attention was above its limit."""
    times = "".join(
        f"{row['us_per_token'][name][1]:11.1f}" if name in row["us_per_token"] else f"{'-':>11}"
        for name in ATTENTIONS
    )
    over = row["quadratic_over"]
    ratios = "".join(f"{over[name]:8.2f}" if name in over else f"{'-':>8}" for name in VQ)
    return f"{row['heads']:5} {row['seq_len']:7} {times}{ratios}"
