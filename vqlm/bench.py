"""Measured time per token of attention alone, against the length of the context, on the CPU.

VQ-attention as the library runs it (quantization and relative bias included) beside its strongest
peer, torch's ``scaled_dot_product_attention`` (causal, flash; neither quantization nor bias).  Both
run in one process, repetition by repetition in turn, so that whatever else the machine does meets
both.  Nothing is timed before VQ-attention has equalled its quadratic oracle.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqlm import fidelity, reference, vq
from vqlm.codebook import Codebook
from vqlm.config import LMConfig
from vqlm.layers import RelativeBias, rms

LENGTHS = tuple(512 * 2**i for i in range(8))
"""Default context lengths in tokens, 512 ... 65536."""

MAX_QUADRATIC = 16384
"""Default longest context, in tokens, at which quadratic attention is timed too."""

REPEATS = 5
"""Default number of timings of each mixer at each length."""

SIZES = LMConfig(n_head=8, d_k=64, d_v=64, n_code=512, window=128, block=128)
"""Default sizes; only heads, widths, codes, window and block are read."""

CHECKED = LMConfig(n_head=3, d_k=8, d_v=5, n_code=7, window=6, block=4)
"""Sizes of the equivalence check, small enough for the quadratic oracle."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time passed, or the processor time of this process in all its threads: with one thread the same,
except that other programs on the same core don't count."""

PASSES = ("forward", "forward+backward")
MIXERS = {"vq": "VQ-attention", "sdpa": "torch scaled_dot_product_attention"}


@dataclass(frozen=True)
class Row:
    """What one mixer took at one length in one kind of pass."""

    what: str
    """What was timed: "attention" is attention alone, without projections."""
    mixer: str
    """A key of ``MIXERS``."""
    seq_len: int
    """Tokens in the one row of the batch."""
    pass_: str
    """One of ``PASSES``; "forward" keeps what a backward pass would need."""
    us_per_token_median: float
    """Microseconds a token, the median of the repetitions."""
    us_per_token_spread: tuple[float, float]
    """Their lower and upper quartile."""
    ratio_vs: dict[str, float]
    """Time of another mixer over this one's, above 1 where this one is faster; the median over
    pairs of neighbouring repetitions.  Empty where the other was not timed."""


@dataclass(frozen=True)
class _Inputs:
    """One random example.  Queries and keys are normalised and scaled as the model's are."""

    config: LMConfig
    query: Tensor  # [1, H, T, K]
    key: Tensor  # [1, G, T, K]
    value: Tensor  # [1, G, T, V]
    bias: RelativeBias
    codebook: Codebook
    d_out: Tensor  # [1, H, T, V], the gradient of the output

    @classmethod
    def of(cls, config: LMConfig, seq_len: int, dtype: torch.dtype, seed: int) -> _Inputs:
        generator = torch.Generator().manual_seed(seed)
        heads, groups, width = config.n_head, config.kv_heads, config.d_k

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        def unit(*shape: int) -> Tensor:
            return width**-0.25 * rms(normal(*shape))

        book = Codebook(groups, config.n_code, width).to(dtype)
        book.key_sum.copy_(unit(groups, config.n_code, width))
        bias = RelativeBias(
            normal(heads, width) / 10,
            normal(heads, width) / 10,
            unit(heads, config.window + 1, width),
        )
        inputs = cls(
            config,
            unit(1, heads, seq_len, width),
            unit(1, groups, seq_len, width),
            normal(1, groups, seq_len, config.d_v),
            bias,
            book,
            normal(1, heads, seq_len, config.d_v),
        )
        for x in inputs.leaves("vq"):
            x.requires_grad_()
        return inputs

    def leaves(self, mixer: str) -> list[Tensor]:
        """What ``mixer`` gives gradients to."""
        rest = list(self.bias) if mixer == "vq" else []
        return [self.query, self.key, self.value, *rest]


def _vq(x: _Inputs) -> Tensor:
    """VQ-attention of a whole sequence, keys quantized on the way: [1, H, T, V]."""
    codes = x.codebook.codes()
    valid = torch.ones(1, x.key.shape[2], dtype=torch.bool)
    keys = x.codebook(x.key, codes, valid, with_stats=False)
    state = vq.initial_state(x.config, 1, x.query)
    block = x.config.block
    out, _ = vq.vq_attention(x.query, keys, x.value, codes, x.bias, state, block=block)
    return out


def _sdpa(x: _Inputs) -> Tensor:
    """Flash attention of torch over the unquantized keys: [1, H, T, V]."""
    grouped = x.config.kv_heads != x.config.n_head
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            x.query, x.key, x.value, is_causal=True, scale=1.0, enable_gqa=grouped
        )


_RUN: dict[str, Callable[[_Inputs], Tensor]] = {"vq": _vq, "sdpa": _sdpa}


def check_equivalence(config: LMConfig = CHECKED, seq_len: int = 27, seed: int = 0) -> float:
    """Holds what is timed to the quadratic oracle, outputs and gradients, in float64.

    Returns the largest difference.

    Raises:
        RuntimeError: it is more than rounding.
    """
    x = _Inputs.of(config, seq_len, torch.float64, seed)
    bias = (x.bias.content, x.bias.position, x.bias.rows)
    oracle = reference.vq_attention_quadratic(
        x.query, x.key, x.value, x.codebook.codes(), bias,
        torch.zeros(1, seq_len, dtype=torch.long), list(range(0, seq_len, config.block)),
    )  # fmt: skip
    sides = []
    for out in (_vq(x), oracle):
        sides.append((out, *torch.autograd.grad(out, x.leaves("vq"), x.d_out)))
    pairs = zip(*sides, strict=True)
    worst = max((got - want).abs().max().item() for got, want in pairs)
    if not worst < 1e-9:
        raise RuntimeError(
            f"bench: VQ-attention differs from its quadratic oracle by {worst:.3g} in float64, "
            "which is more than rounding; nothing was timed"
        )
    return worst


def attention_rows(
    config: LMConfig = SIZES,
    lengths: Sequence[int] = LENGTHS,
    *,
    max_quadratic: int = MAX_QUADRATIC,
    repeats: int = REPEATS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Times both mixers in float32 on one sequence of each of ``lengths`` tokens.

    Args:
        config: heads, widths, codes, window and block.
        lengths: numbers of tokens.
        max_quadratic: longest of them at which ``scaled_dot_product_attention`` is timed.
        repeats: timings of each; what is returned is their median and quartiles.
        seed: of the random inputs.
        clock: seconds since some moment, one of ``CLOCKS``.
        report: called with each row as soon as it is known.

    Raises:
        RuntimeError: VQ-attention is not equal to its oracle.
        ValueError: no lengths or repeats.
    """
    if repeats < 1 or not lengths or min(lengths) < 1:
        raise ValueError(
            f"bench: got lengths={list(lengths)} and repeats={repeats}; "
            "want at least one length of at least one token, and at least one repeat"
        )
    check_equivalence()
    warm = _Inputs.of(config, min(lengths), torch.float32, seed)
    for mixer in MIXERS:
        _time(mixer, warm, clock)
    rows = []
    for seq_len in lengths:
        mixers = [name for name in MIXERS if name == "vq" or seq_len <= max_quadratic]
        x = _Inputs.of(config, seq_len, torch.float32, seed)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in mixers}
        for _ in range(repeats):
            for name in mixers:
                seconds[name].append(_time(name, x, clock))
        for row in _summarise(seconds, seq_len):
            rows.append(row)
            report(row)
    return rows


def _time(mixer: str, x: _Inputs, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a forward pass, and of it and its backward pass together."""
    begin = clock()
    out = _RUN[mixer](x)
    middle = clock()
    torch.autograd.grad(out, x.leaves(mixer), x.d_out)
    return middle - begin, clock() - begin


def _summarise(seconds: dict[str, list[tuple[float, float]]], seq_len: int) -> Iterable[Row]:
    """Rows of all mixers and passes at one length; ``seconds`` has one pair a repetition."""
    for index, pass_ in enumerate(PASSES):
        times = {name: [pair[index] for pair in pairs] for name, pairs in seconds.items()}
        for name, own in times.items():
            us = [round(1e6 * t / seq_len, 2) for t in own]
            low, middle, high = (
                statistics.quantiles(us, n=4, method="inclusive") if len(us) > 1 else us * 3
            )
            ratios = {
                other: round(statistics.median(b / a for a, b in zip(own, theirs, strict=True)), 3)
                for other, theirs in times.items()
                if other != name
            }
            yield Row("attention", name, seq_len, pass_, middle, (low, high), ratios)


def plot(rows: Sequence[Row], path: Path | str, note: str = "") -> None:
    """Draws time per token of a forward and backward pass against length, as .svg or .png.

    ``note`` is small print under the title, such as sizes and device.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # No date and no random ids, so that the same rows give the same file.
    settings: Any = {"svg.hashsalt": "vqlm", "font.family": "DejaVu Sans", "font.size": 10}
    with rc_context(settings):
        figure = Figure(figsize=(7, 4), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, [row for row in rows if row.pass_ == PASSES[1]])
        title = "Time per token of attention alone, forward and backward"
        pad = 36 if note else 8
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12, pad=pad)
        axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9, color="#444444")
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None
        figure.savefig(path, dpi=200, metadata=metadata)


def _draw_lines(axes: Any, rows: Sequence[Row]) -> None:
    """Medians as lines with a label at the end of each, quartiles as bars."""
    colours = {"vq": "#0072B2", "sdpa": "#D55E00"}  # told apart with any colour vision
    for mixer, label in MIXERS.items():
        own = [row for row in rows if row.mixer == mixer]
        if not own:
            continue
        middle = [row.us_per_token_median for row in own]
        high = [row.us_per_token_spread[1] for row in own]
        below = [row.us_per_token_median - row.us_per_token_spread[0] for row in own]
        errors = [below, [h - m for h, m in zip(high, middle, strict=True)]]
        axes.errorbar(
            [row.seq_len for row in own], middle, errors, color=colours[mixer], linewidth=2,
            marker="o" if mixer == "vq" else "s", markersize=5, capsize=3,
        )  # fmt: skip
        axes.annotate(
            f"{label}\n" + _in_words(own[-1]), (own[-1].seq_len, high[-1]),
            xytext=(0, 8), textcoords="offset points", ha="right" if mixer == "vq" else "center",
            color=colours[mixer], fontweight="bold", linespacing=1.3,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )  # fmt: skip
    ticks = sorted({row.seq_len for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_short(n) for n in ticks])
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="y", nbins=6)
    axes.set_ylim(0, 1.2 * max(row.us_per_token_spread[1] for row in rows))
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("time per token (µs)")
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _in_words(row: Row) -> str:
    """The last point of a line, and by how much it lies above VQ-attention's."""
    ratio = row.ratio_vs.get("vq")
    factor = f", {1 / ratio:.1f} times VQ" if ratio else ""
    return f"{row.us_per_token_median:.0f} µs at {_short(row.seq_len)}{factor}"


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``run`` reads."""
    parser.add_argument(
        "what", choices=["attention", "fidelity"],
        help="attention: speed of attention alone; fidelity: error of OVQ's dictionaries",
    )  # fmt: skip
    parser.add_argument(
        "--rules", metavar="KEY=VALUE,...",
        help="fidelity: rules and sizes of LMConfig to measure; default: a table of variants",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="N",
        help="context lengths in tokens (default: 512 to 65536, doubling)",
    )  # fmt: skip
    parser.add_argument(
        "--max-quadratic", type=int, default=MAX_QUADRATIC, metavar="N",
        help="time scaled_dot_product_attention up to this length (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="torch's threads (default: torch's)"
    )
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall",
        help="cpu: processor time of all threads, for one thread on a busy machine",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, nargs="+", default=[], metavar="PATH", help="draw to .svg or .png"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times, draws, prints a table and returns all of it."""
    if args.what == "fidelity":
        return fidelity.run(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    def report(row: Row) -> None:
        print(_line(row), flush=True)

    rows = attention_rows(
        lengths=sorted(args.lengths), max_quadratic=args.max_quadratic, repeats=args.repeats,
        clock=CLOCKS[args.clock], report=report,
    )  # fmt: skip
    result = {
        "bench": args.what,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "sizes": {k: getattr(SIZES, k) for k in ("n_head", "d_k", "d_v", "n_code", "window")},
        "repeats": args.repeats,
        "clock": args.clock,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    for path in args.plot:
        plot(rows, path, _note(result))
    return result


def _line(row: Row) -> str:
    low, high = row.us_per_token_spread
    ratio = row.ratio_vs.get("sdpa")
    return (
        f"{row.mixer:4} {row.seq_len:6} tokens  {row.pass_:16} "
        f"{row.us_per_token_median:7.1f} us/token ({low:.1f} to {high:.1f})"
        + (f"  {ratio:.2f}x as fast as sdpa" if ratio else "")
    )


def _device() -> str:
    name = platform.processor() or platform.machine()
    return f"{name} CPU ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"


def _note(result: dict[str, Any]) -> str:
    sizes, n, repeats = result["sizes"], result["threads"], result["repeats"]
    clock = {"wall": "", "cpu": " (processor time)"}[result["clock"]]
    return (
        f"float32, {sizes['n_head']} heads of {sizes['d_k']}; VQ with {sizes['n_code']} codes, "
        "quantization included\n"
        f"CPU, {n} thread{'s' * (n != 1)}{clock}; median of {repeats}, bars are quartiles"
    )
