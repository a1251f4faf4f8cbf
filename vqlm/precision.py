"""Which number format multiplies matrices faster here, and how to get the same bits each time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import cache

import torch

SIZE = 256
"""Rows and columns of the products that are timed."""


@cache
def fastest(device_type: str) -> str:
    """The faster one of "bfloat16" and "float32" in products of matrices.

    A CPU is asked by timing (a few products of 256 x 256): processors without bfloat16
    instructions emulate it, up to a hundred times slower than float32.  ``device_type`` is that of
    a ``torch.device``.
    """
    if device_type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if real else "float32"
    if device_type != "cpu":
        return "float32"
    return "bfloat16" if _seconds(torch.bfloat16) < _seconds(torch.float32) else "float32"


def _seconds(dtype: torch.dtype) -> float:
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return min(times)


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Only operations that give the same bits each time on one machine, if that is ``wanted``.

    Raises, inside:
        RuntimeError: an operation that torch has no such kernel for.
    """
    if not wanted:
        yield
        return
    # What cuBLAS wants to hear before its first product; torch refuses products without.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    tries_out, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=only_warns)
        torch.backends.cudnn.benchmark = tries_out
