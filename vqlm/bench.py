"""``vqlm bench``: what can be measured, its options, its result as one dictionary.

Each benchmark is a file of its own; ``timing`` has what they share.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from vqlm import (
    bench_attention,
    bench_decode,
    bench_limit,
    bench_model,
    bench_official,
    fidelity,
    timing,
)
from vqlm.settings import only_settings

MEASURED = {
    "attention": bench_attention.run,
    "model": bench_model.run,
    "decode": bench_decode.run,
    "official": bench_official.run,
}
"""Benchmarks of rows that have a limit and a picture."""

HELP = {
    "attention": "attention alone: vq, ovq, sdpa (torch's, causal)",
    "model": "a training step of a whole model: vq, ovq, window, softmax, sdpa, llama,\n"
    "gated-deltanet, mamba2 (transformers' models have as many parameters as vq; ovq and sdpa\n"
    "are without its relative positions and codebooks, and have up to 8% fewer)",
    "decode": "one token with many behind it: vq, ovq, window, softmax, llama, llama-static",
    "official": "our training step at the shape of the official JAX code's; one thread",
    "limit": "how fast this machine multiplies matrices (of --lengths rows) and copies memory",
    "fidelity": "error of OVQ's dictionaries against full attention",
}

_TRAINED = ("model", "official")
_TIMED = ("attention", *_TRAINED, "decode")

READ_BY: dict[str, tuple[str, ...]] = {
    "lengths": (*_TIMED, "limit"),
    "mixers": _TIMED,
    "against": _TIMED,
    "repeats": (*_TIMED, "limit"),
    "repeats_long": ("attention", *_TRAINED),
    "max_quadratic": ("attention", *_TRAINED),
    "threads": (*_TIMED, "limit"),
    "clock": (*_TIMED, "limit"),
    "plot": _TIMED,
    "blocks": ("attention",),
    "forward_from": ("attention",),
    "sizes": (*_TRAINED, "decode"),
    "precision": _TRAINED,
    "checkpointing": _TRAINED,
    "stretch": _TRAINED,
    "compile": _TRAINED,
    "batch_size": ("decode",),
    "tokens": ("decode",),
    "rules": ("fidelity",),
}
"""Benchmarks that read an option, by its name; ``--no-memory`` is kept by all."""

EPILOG = "benchmarks:\n" + "\n".join(
    f"  {name:<11}" + text.replace("\n", "\n" + " " * 13) for name, text in HELP.items()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``run`` reads."""
    parser.add_argument("benchmark", choices=list(HELP), help="see below")
    parser.add_argument(
        "what", nargs="*", metavar="key=value", help="sizes: fields of LMConfig (vqlm/config.py)"
    )
    parser.add_argument(
        "--lengths", type=timing.numbers, nargs="+", metavar="N",
        help="sequence lengths in tokens; decode: tokens behind the one decoded",
    )  # fmt: skip
    parser.add_argument(
        "--mixers", type=_names, metavar="A,B,...", help="ours to measure (default: vq)"
    )
    parser.add_argument(
        "--against", type=_names, metavar="A,B,...",
        help="peers, or none (default: sdpa; decode: llama; official: none)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, metavar="N",
        help=f"timings of each side (default: {timing.REPEATS}; limit: {2 * timing.REPEATS})",
    )  # fmt: skip
    parser.add_argument(
        "--repeats-long", type=int, default=1, metavar="N",
        help="of quadratic ones at more than 16384 tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-quadratic", type=int, metavar="N",
        help="leave quadratic ones out at more tokens (default: never)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="torch's (default: torch's)")
    parser.add_argument(
        "--clock", choices=list(timing.CLOCKS), default="wall",
        help="cpu: processor time of all threads, for one thread on a busy machine",
    )  # fmt: skip
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false",
        help="don't measure peak memory, which runs everything once more in a fresh process",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, nargs="+", default=[], metavar="PATH", help="draw to .svg or .png"
    )
    _add_special_arguments(parser)


def _add_special_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that single benchmarks read."""
    attention = parser.add_argument_group("attention")
    attention.add_argument(
        "--blocks",
        type=timing.numbers,
        metavar="L,L,...",
        help="block lengths of vq to choose from",
    )
    attention.add_argument(
        "--forward-from", type=int, default=bench_attention.FORWARD_FROM, metavar="N",
        help="no backward pass from this length on (default: %(default)s)",
    )  # fmt: skip
    models = parser.add_argument_group("model, official, decode")
    models.add_argument(
        "--sizes", choices=list(bench_model.SIZES),
        help="modern: 12 blocks of d_model 512; paper, official: gated layers (default: modern)",
    )  # fmt: skip
    models.add_argument(
        "--precision", choices=list(bench_model.PRECISIONS), default="float32",
        help="of matrix products in training (default: %(default)s)",
    )  # fmt: skip
    models.add_argument(
        "--checkpointing", action="store_true",
        help="all models compute layers again in the backward pass, to need less memory",
    )  # fmt: skip
    models.add_argument(
        "--stretch", type=int, metavar="N",
        help="with it: ours, but for softmax, compute N tokens again at once, through all layers",
    )  # fmt: skip
    models.add_argument(
        "--compile", action="store_true",
        help="our models' norms and SwiGLUs compiled by torch.compile (JSON: first_step_s)",
    )  # fmt: skip
    decode = parser.add_argument_group("decode")
    decode.add_argument(
        "--batch-size", type=int, default=1, metavar="B",
        help="rows decoded side by side (default: %(default)s)",
    )  # fmt: skip
    decode.add_argument(
        "--tokens", type=int, default=bench_decode.TOKENS, metavar="N",
        help="decoded in one repetition (default: %(default)s)",
    )  # fmt: skip
    rules = parser.add_argument_group("fidelity")
    rules.add_argument(
        "--rules", metavar="KEY=VALUE,...",
        help="rules and sizes of LMConfig to measure; default: a table of variants",
    )  # fmt: skip


def _names(text: str) -> list[str]:
    return [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]


def _refuse_unread(args: argparse.Namespace, pairs: dict[str, str]) -> None:
    """Raises ValueError for what was asked of a benchmark that does not read it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, benchmarks in READ_BY.items():
        asked = getattr(args, name) != parser.get_default(name)
        if asked and args.benchmark not in benchmarks:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"bench {args.benchmark} does not read {option}, which is for "
                f"{', '.join(benchmarks)}"
            )
    if pairs and args.benchmark in ("limit", "fidelity"):
        raise ValueError(f"bench {args.benchmark} has no sizes to set, got {args.what[0]}")
    if "mixers" in pairs:
        raise ValueError("bench: mixers are what is compared; give them with --mixers")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints a table, draws, and returns all of it.

    Raises:
        ValueError: names, sizes or numbers that can't be.
        RuntimeError: what should be equal isn't; nothing was timed.
    """
    pairs = only_settings(args.what)
    _refuse_unread(args, pairs)
    args.lengths = sorted({n for part in args.lengths or [] for n in part})
    if args.benchmark == "fidelity":
        return fidelity.run(args)
    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: want at least 1")
    threads = args.threads or (1 if args.benchmark == "official" else None)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if args.benchmark == "limit":
            return bench_limit.run(args)
        found = MEASURED[args.benchmark](args, pairs)
        result = {"bench": args.benchmark, **timing.machine(), "clock": args.clock, **found}
    finally:
        torch.set_num_threads(before)
    if args.plot:
        _draw(result, args.plot)
    return result


def _draw(result: dict[str, Any], paths: list[Path]) -> None:
    from vqlm.bench_plot import plot

    for path in paths:
        plot(result["rows"], path, _note(result))


def _note(result: dict[str, Any]) -> str:
    sizes, n = result["sizes"], result["threads"]
    clock = {"wall": "", "cpu": " (processor time)"}[result["clock"]]
    what = f"{sizes['n_head']} heads of {sizes['d_k']}, {sizes['n_code']} codes"
    if "d_model" in sizes:
        what = f"{sizes['n_layer']} layers of width {sizes['d_model']}, {what}"
    return (
        f"float32, {what}; quantization included\n"
        f"CPU, {n} thread{'s' * (n != 1)}{clock}; medians, bars are quartiles"
    )
