"""Decoding: one token at a time, with many behind it.

vqlm's model has read all tokens that it is said to have behind it.  A key-value cache is filled
with random numbers of the right shape instead, since its time does not depend on them, and reading
100,000 tokens with quadratic attention takes hours here.  Token by token equals all at once
(checked in float64) before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vqlm import bench_attention, bench_peers, timing
from vqlm.bench_limit import memory_rate, summary
from vqlm.bench_model import SIZES
from vqlm.config import LMConfig, from_dict, override, require_known
from vqlm.model import LMState

BEHIND = (1024, 32768, 131072)
"""Default numbers of tokens behind the one that is decoded."""

TOKENS = 32
"""Default number of tokens decoded in one repetition."""

CALL = 4096
"""Tokens read in one call."""

PASS = "token"
OURS = ("vq", "ovq", "window", "softmax")
PEERS = ("llama", "llama-static")
"""With the cache that ``generate`` takes by default, and with one of fixed size."""


def check_equivalence(mixer: str) -> float:
    """Holds token by token to all at once, in float64; returns the largest difference of logits.

    Raises:
        RuntimeError: it is more than rounding.
    """
    config = LMConfig(
        vocab_size=11, n_layer=2, d_model=8, n_head=2, d_k=4, d_v=4, d_ff=8, n_code=5, window=6,
        block=4, n_entry=5, chunk=4,
    )  # fmt: skip
    lm = bench_peers.own_model(mixer, config).double().eval()
    tokens = torch.randint(11, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state: LMState | None = None
        worst = 0.0
        for token, want in zip(tokens.T, lm(tokens).logits.unbind(1), strict=True):
            out = lm(token[:, None], state)
            state = out.state
            worst = max(worst, (out.logits[:, 0] - want).abs().max().item())
    if not worst < 1e-9:
        raise RuntimeError(
            f"bench: {mixer} decodes logits that differ by {worst:.3g} in float64 from those of "
            "all tokens at once, which is more than rounding; nothing was timed"
        )
    return worst


def _own(name: str, config: LMConfig, behind: int, batch: int, n_token: int) -> timing.Built:
    lm = bench_peers.own_model(name, config).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, behind + 1), generator=generator)
    state: LMState | None = None
    with torch.inference_mode():
        for part in tokens[:, :-1].split(CALL, 1):
            state = lm(part, state).state
    assert state is not None
    last, start = tokens[:, -1:], state

    def run() -> Iterator[str]:
        for _ in lm.stream(last, n_token, temperature=0.0, state=start):
            pass
        yield PASS

    return _built(run, bench_peers.n_parameter(lm), start.bytes(), n_token)


def _llama(name: str, config: LMConfig, behind: int, batch: int, n_token: int) -> timing.Built:
    from transformers import DynamicCache, StaticCache

    model = bench_peers.hf_model("llama", config).eval()
    static = name == "llama-static"
    cache: Any
    if static:
        cache = StaticCache(config=model.config, max_cache_len=behind + n_token)
    else:
        cache = DynamicCache(config=model.config)
    groups = model.config.num_key_value_heads
    shape = (batch, groups, behind, model.config.head_dim)
    with torch.inference_mode():
        for layer in range(config.n_layer):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
    last = torch.zeros(batch, 1, dtype=torch.long)
    n_byte = 2 * config.n_layer * batch * groups * behind * model.config.head_dim * 4

    def run() -> Iterator[str]:
        with torch.inference_mode():
            # Forgets what the run before decoded.
            cache.crop(behind - int(cache.get_seq_length()))
            token = last
            for _ in range(n_token):
                out = model(token, cache=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
        yield PASS

    return _built(run, bench_peers.n_parameter(model), n_byte, n_token)


def _built(run: Any, n_parameter: int, state_bytes: int, n_token: int) -> timing.Built:
    """Each token reads all parameters, and what is remembered, at least once."""
    work = {PASS: n_token * float(4 * n_parameter + state_bytes)}
    return timing.Built(run, work, {"parameters": n_parameter, "state_bytes": state_bytes})


def build(name: str, config: dict[str, Any], behind: int, batch: int, n_token: int) -> timing.Built:
    """A side: a model of ``OURS`` or ``PEERS`` with ``behind`` tokens read, decoding greedily."""
    make = _own if name in OURS else _llama
    return make(name, from_dict(LMConfig, config), behind, batch, n_token)


def decode_rows(
    plan: timing.Plan,
    config: LMConfig,
    behind: Sequence[int],
    names: Sequence[str],
    *,
    repeats: int = timing.REPEATS,
    batch: int = 1,
    n_token: int = TOKENS,
) -> tuple[list[timing.Row], list[float]]:
    """Rows of all models ``names`` with each of ``behind`` tokens read, and the limit's rates.

    Raises:
        RuntimeError: token by token is not all at once.
        ValueError: nothing to time, or an unknown name.
    """
    bench_attention.require_some(behind, (repeats, batch, n_token))
    for name in names:
        require_known("model", name, (*OURS, *PEERS))
        if name in OURS:
            check_equivalence(name)
    rows, rates = [], []
    for position in behind:
        sides = []
        for name in names:
            settings = {
                "name": name, "config": dataclasses.asdict(config), "behind": position,
                "batch": batch, "n_token": n_token,
            }  # fmt: skip
            sides.append(timing.Side(name, f"{__name__}:build", settings, repeats))
        found, more = plan.rows(sides, position, batch * n_token, steps=n_token)
        rows += found
        rates += more
    return rows, rates


def run(args: argparse.Namespace, pairs: dict[str, str]) -> dict[str, Any]:
    """Times, prints a table and returns all of it; ``pairs``: sizes of the command line.

    Raises:
        ValueError: settings or names that don't exist.
    """
    sizes = args.sizes or "modern"
    config = override(SIZES[sizes], pairs)
    names = [*(args.mixers or ["vq"]), *(("llama",) if args.against is None else args.against)]
    plan = timing.Plan(
        "decode", memory_rate, timing.CLOCKS[args.clock], False,
        lambda row: print(f"{timing.line(row)}  {row.facts['state_bytes']:,} bytes", flush=True),
    )  # fmt: skip
    rows, rates = decode_rows(
        plan, config, sorted(args.lengths or BEHIND), names, repeats=args.repeats or timing.REPEATS,
        batch=args.batch_size, n_token=args.tokens,
    )  # fmt: skip
    return {
        "sizes": {"name": sizes, **dataclasses.asdict(config)},
        "batch_size": args.batch_size,
        "limit": {"of": "memory copied, GB/s read and written", **summary(rates)},
        "rows": [row.json() for row in rows],
    }
