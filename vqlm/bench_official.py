"""Our training step at the shape that the official JAX implementation was measured with.

Byte-level, 6 gated layers (3 of its own), d_model 256, block 128, one sequence, one thread.  Two
machines differ, so what is compared is tokens for each GFLOP of matrix products that the machine
could have done in the time (``tokens_per_gflop``).
"""

from __future__ import annotations

import argparse
from typing import Any

from vqlm import bench_model

LENGTHS = (4096, 16384)
"""Default sequence lengths in tokens."""


def run(args: argparse.Namespace, pairs: dict[str, str]) -> dict[str, Any]:
    """Times, prints and returns what ``bench_model.run`` does, with ``tokens_per_gflop``."""
    result = bench_model.run(
        args, pairs, what="official", sizes="official", lengths=LENGTHS, peers=()
    )
    rate = result["limit"]["median"]
    for row in result["rows"]:
        row["tokens_per_gflop"] = round(row["tokens_per_s"] / rate, 2)
        print(
            f"{row['mixer']} at {row['seq_len']} tokens: {row['tokens_per_gflop']} tokens for each "
            f"GFLOP of matrix products ({rate} GFLOP/s)"
        )
    return result
