"""Operator fidelity: how far OVQ-attention is from full attention, without any training.

    vqlm bench fidelity
    vqlm bench fidelity --rules growth=eager,filing=merge,n_entry=128

Streams of known structure: keys and queries lie around centres whose frequency follows Zipf's law,
values around one value a centre, so that a dictionary has something to find, and a long tail to
lose.  The figure is |out - full| / |out of full attention| over all tokens.  It takes seconds, and
is the first test of an idea, not the last: what wins here must win in training too.

Axes: B streams, T time, K key and value width, C centres.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vqlm.config import LMConfig, override, require_known
from vqlm.dictionary import Rules
from vqlm.ovq import initial_state, ovq_attention

SIZES = LMConfig(n_head=4, d_k=32, d_v=32, n_entry=256, chunk=128)
"""Default sizes: N, L, K and V; streams go side by side as heads."""

READ = (
    "n_head", "n_kv_head", "d_k", "d_v", "n_entry", "chunk", "growth", "growth_span", "founders",
    "filing", "entry_rate", "entry_read",
)  # fmt: skip
"""Settings that what is measured depends on."""

VARIANTS: dict[str, str] = {
    "default": "",
    "mean": "entry_read=mean",
    "gmr": "entry_read=gmr",
    "first": "founders=first",
    "random": "founders=random",
    "kmeans++": "founders=kmeans++",
    "exponential": "growth=exponential",
    "eager": "growth=eager",
    "linear": "growth=linear,growth_span=2048",
    "rate 0.1": "entry_rate=0.1",
    "merge": "growth=eager,filing=merge",
    "merge plateau": "filing=merge",
}
"""The paper's rules (with the read that won), what ablates them, and merging, by settings."""


class Stream(NamedTuple):
    """What the random streams are."""

    n_token: int = 2048
    n_centre: int = 640
    """Centres C; the i-th most frequent has a share in proportion to 1 / i."""
    noise: float = 0.3
    """Length, about, of what a key or query is off its centre before it is scaled to length 1."""
    value_noise: float = 0.5
    """Standard deviation of a value around that of its centre, which itself has 1."""
    beta: float = 10.0
    """Inverse temperature."""


def draw(
    stream: Stream, n_stream: int, width: int, seed: int
) -> tuple[Float[Tensor, "1 B T K"], Float[Tensor, "1 B T K"], Float[Tensor, "1 B T K"]]:
    """Queries, keys and values of ``n_stream`` streams, each with centres of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n_stream, *shape, width, generator=generator)

    centres, values = F.normalize(normal(stream.n_centre), dim=-1), normal(stream.n_centre)
    share = 1 / torch.arange(1, stream.n_centre + 1)

    def around() -> tuple[Tensor, Int[Tensor, "B T"]]:
        index = torch.multinomial(
            share.expand(n_stream, -1), stream.n_token, replacement=True, generator=generator
        )
        off = stream.noise / width**0.5 * normal(stream.n_token)
        return F.normalize(_take(centres, index) + off, dim=-1), index

    key, of_key = around()
    query, _ = around()
    value = _take(values, of_key) + stream.value_noise * normal(stream.n_token)
    return query[None], key[None], value[None]


def _take(rows: Tensor, index: Int[Tensor, "B T"]) -> Tensor:
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


@torch.inference_mode()
def error(config: LMConfig, stream: Stream = Stream(), seed: int = 0) -> float:  # noqa: B008
    """Relative error of OVQ-attention of ``config`` (N, L, rules) on ``n_head`` streams."""
    query, key, value = draw(stream, config.n_head, config.d_k, seed)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=stream.beta)
    beta = torch.full((config.n_head,), stream.beta)
    state = initial_state(config, 1, query)
    out, _ = ovq_attention(query, key, value, beta, state, rules=Rules.of(config))
    return ((out - want).norm() / want.norm()).item()


def state_bytes(config: LMConfig) -> int:
    """Bytes of one head's state in float32, the open chunk included."""
    per_token = config.d_k + config.d_v
    return 4 * (config.n_entry * (per_token + 1) + config.chunk * per_token)


def table(
    variants: dict[str, str], sizes: LMConfig = SIZES, seeds: Sequence[int] = (0, 1, 2)
) -> list[dict[str, Any]]:
    """A row for each of ``variants``: mean and spread of the error over ``seeds``.

    Raises:
        ValueError: settings that ``LMConfig`` or the streams don't have, or no seeds.
    """
    if not seeds:
        raise ValueError("fidelity: want at least one seed")
    rows = []
    for name, settings in variants.items():
        pairs = [part.split("=", 1) for part in settings.split(",") if part]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"fidelity: {settings!r} is not key=value,key=value")
        for pair in pairs:
            require_known("setting of OVQ", pair[0], READ)
        config = override(sizes, dict(pairs))
        if config.d_v != config.d_k or config.kv_heads != config.n_head:
            raise ValueError(
                f"fidelity: {settings!r} has d_k={config.d_k}, d_v={config.d_v}, "
                f"n_head={config.n_head}, n_kv_head={config.kv_heads}; want values as wide as "
                f"keys, and as many heads of both"
            )
        errors = [error(config, seed=seed) for seed in seeds]
        spread = statistics.stdev(errors) if len(errors) > 1 else None
        rows.append(
            {
                "name": name, "settings": settings, "error": statistics.mean(errors),
                "spread": spread, "each": errors, "state_bytes": state_bytes(config),
            }
        )  # fmt: skip
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints a table and returns it."""
    variants = VARIANTS if args.rules is None else {"default": "", args.rules: args.rules}
    rows = table(variants)
    print(f"{'rules':>28}  error  spread  bytes a head")
    for row in rows:
        print(
            f"{row['name']:>28}  {row['error']:.3f}  {row['spread']:.3f}   {row['state_bytes']:11,}"
        )
    return {"bench": "fidelity", "stream": Stream()._asdict(), "rows": rows}
