"""The machine's limit: how fast it multiplies matrices in float32, and how fast memory is copied.

Every benchmark measures one of both between its own repetitions, so that a share of the limit is
one of the moment.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vqlm import timing

SIZE = 2048
"""Rows and columns of the products that are timed."""

COPIED = 128 * 2**20
"""Bytes that are copied: more than any cache holds."""

TIMES = 2
"""Products or copies of one measurement."""


@cache
def _matrices(size: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.rand(2, size, size).unbind()
    return a, b, torch.mm(a, b)


@cache
def _buffers(n_byte: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n_byte // 4), torch.ones(n_byte // 4)


def matmul_rate(clock: Callable[[], float], size: int = SIZE) -> float:
    """Floating-point operations a second in products of two float32 matrices of ``size``."""
    a, b, out = _matrices(size)
    begin = clock()
    for _ in range(TIMES):
        torch.mm(a, b, out=out)
    return TIMES * 2 * size**3 / (clock() - begin)


def memory_rate(clock: Callable[[], float], n_byte: int = COPIED) -> float:
    """Bytes a second that are read or written in copies of ``n_byte``, which counts both."""
    target, source = _buffers(n_byte)
    begin = clock()
    for _ in range(TIMES):
        target.copy_(source)
    return TIMES * 2 * n_byte / (clock() - begin)


def summary(rates: list[float]) -> dict[str, Any]:
    """Median and quartiles of rates in units of 10^9 a second."""
    low, middle, high = timing.quartiles([rate / 1e9 for rate in rates])
    return {"median": round(middle, 2), "spread": [round(low, 2), round(high, 2)]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures both limits in turn, prints and returns them."""
    clock = timing.CLOCKS[args.clock]
    repeats = args.repeats or 2 * timing.REPEATS
    sizes = args.lengths or [SIZE]
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(1 + repeats):
        for size in sizes:
            rates.setdefault(("float32 matrix product", size), []).append(matmul_rate(clock, size))
        rates.setdefault(("memory copy", COPIED), []).append(memory_rate(clock))
        if number == 0:  # to warm up
            rates.clear()
    rows = []
    for (name, size), found in rates.items():
        work = 2 * size**3 if name.startswith("float32") else 2 * size
        low, middle, high = timing.quartiles([1e3 * work / rate for rate in found])
        rows.append(
            {
                "what": "limit", "mixer": name, "size": size, "ms_median": round(middle, 3),
                "ms_spread": [round(low, 3), round(high, 3)], "repeats": repeats,
                "giga_per_s": round(statistics.median(found) / 1e9, 2),
            }
        )  # fmt: skip
        unit = "GFLOP/s" if name.startswith("float32") else "GB/s"
        print(f"{name:24}{size:12,}  {rows[-1]['giga_per_s']:8.1f} {unit}")
    return {"bench": "limit", **timing.machine(), "clock": args.clock, "rows": rows}
