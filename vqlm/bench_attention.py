"""Attention alone, VQ and OVQ beside torch's ``scaled_dot_product_attention``.

VQ-attention runs as in the library (quantization and relative bias included), OVQ-attention with
the growth of its dictionary; torch's is causal, its flash kernel, with neither.  Nothing is timed
before both have equalled their oracles, outputs and gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqlm import fidelity, ovq, reference, timing, vq
from vqlm.bench_limit import matmul_rate, summary
from vqlm.codebook import Codebook
from vqlm.config import LMConfig, from_dict, override, require_known
from vqlm.dictionary import Rules, dictionary_size
from vqlm.flops import TRAINING, attention_flops
from vqlm.fused import normalised
from vqlm.layers import RelativeBias

LENGTHS = tuple(512 * 2**i for i in range(7))
"""Default context lengths in tokens, 512 ... 32768."""

FORWARD_FROM = 131072
"""Default length, in tokens, from which on the backward pass is left out."""

LONG = 16384
"""Longest sequence, in tokens, at which quadratic attention is repeated as often as the others."""

SIZES = LMConfig(n_head=8, d_k=64, d_v=64, n_code=512, window=128, block=128)
"""Default sizes; only those of attention are read."""

READ = (*fidelity.READ, "n_code", "window", "block", "cache")
"""Fields of ``LMConfig`` that attention alone has."""

CHECKED = LMConfig(
    n_head=3, d_k=8, d_v=5, n_code=7, window=6, block=4, n_entry=7, chunk=4
)  # fmt: skip
"""Sizes of the equivalence check, small enough for the oracles."""

PASSES = ("forward", "forward+backward")
OWN = ("vq", "ovq")
PEERS = ("sdpa",)
BETA = 8.0
"""Inverse temperature of OVQ-attention's heads."""


@dataclass(frozen=True)
class Inputs:
    """One random example.  Queries and keys are normalised and scaled as the model's are."""

    config: LMConfig
    query: Tensor  # [1, H, T, K]
    key: Tensor  # [1, G, T, K]
    value: Tensor  # [1, G, T, V]
    bias: RelativeBias
    beta: Tensor  # [H]
    codebook: Codebook
    d_out: Tensor  # [1, H, T, V], the gradient of the output

    @classmethod
    def of(cls, config: LMConfig, seq_len: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """For one sequence of ``seq_len`` tokens."""
        generator = torch.Generator().manual_seed(seed)
        heads, groups, width = config.n_head, config.kv_heads, config.d_k

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        def unit(*shape: int) -> Tensor:
            return normalised(normal(*shape), width**-0.25)

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
            torch.full((heads,), BETA, dtype=dtype),
            book,
            normal(1, heads, seq_len, config.d_v),
        )
        for x in (*inputs.leaves("vq"), inputs.beta):
            x.requires_grad_()
        return inputs

    def leaves(self, mixer: str) -> list[Tensor]:
        """What ``mixer`` gives gradients to."""
        rest = {"vq": list(self.bias), "ovq": [self.beta], "sdpa": []}[mixer]
        return [self.query, self.key, self.value, *rest]


def _vq(x: Inputs) -> Tensor:
    """VQ-attention of a whole sequence, keys quantized on the way: [1, H, T, V]."""
    codes = x.codebook.codes()
    valid = torch.ones(1, x.key.shape[2], dtype=torch.bool)
    keys = x.codebook(x.key, codes, valid, with_stats=False)
    state = vq.initial_state(x.config, 1, x.query)
    block = x.config.block
    out, _ = vq.vq_attention(x.query, keys, x.value, codes, x.bias, state, block=block)
    return out


def _ovq(x: Inputs) -> Tensor:
    """OVQ-attention of a whole sequence: [1, H, T, V]."""
    state = ovq.initial_state(x.config, 1, x.query)
    query, key = F.normalize(x.query, dim=-1), F.normalize(x.key, dim=-1)
    out, _ = ovq.ovq_attention(query, key, x.value, x.beta, state, rules=Rules.of(x.config))
    return out


def _sdpa(x: Inputs) -> Tensor:
    """Flash attention of torch over the unquantized keys: [1, H, T, V]."""
    grouped = x.config.kv_heads != x.config.n_head
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            x.query, x.key, x.value, is_causal=True, scale=1.0, enable_gqa=grouped
        )


RUN: dict[str, Callable[[Inputs], Tensor]] = {"vq": _vq, "ovq": _ovq, "sdpa": _sdpa}


def _vq_oracle(x: Inputs) -> Tensor:
    n_token, bias = x.key.shape[2], (x.bias.content, x.bias.position, x.bias.rows)
    return reference.vq_attention_quadratic(
        x.query, x.key, x.value, x.codebook.codes(), bias,
        torch.zeros(1, n_token, dtype=torch.long), list(range(0, n_token, x.config.block)),
    )  # fmt: skip


def _ovq_oracle(x: Inputs) -> Tensor:
    config = x.config

    def size(n_token: int, n_entry: int) -> int:
        wanted = dictionary_size(
            torch.tensor([n_token]), n_entry, config.growth, config.growth_span
        )
        return int(wanted)

    choices = reference.OVQChoices(config.n_entry, config.chunk, size)
    query, key = F.normalize(x.query, dim=-1), F.normalize(x.key, dim=-1)
    return reference.ovq_attention_token_by_token(query, key, x.value, x.beta, choices)


_ORACLES = {"vq": _vq_oracle, "ovq": _ovq_oracle}


def check_equivalence(mixer: str, config: LMConfig = CHECKED, seq_len: int = 27) -> float:
    """Holds what is timed to its oracle, outputs and gradients, in float64.

    Returns the largest difference.

    Raises:
        RuntimeError: it is more than rounding.
    """
    x = Inputs.of(config, seq_len, torch.float64)
    sides = []
    for out in (RUN[mixer](x), _ORACLES[mixer](x)):
        sides.append((out, *torch.autograd.grad(out, x.leaves(mixer), x.d_out)))
    pairs = zip(*sides, strict=True)
    worst = max((got - want).abs().max().item() for got, want in pairs)
    if not worst < 1e-9:
        raise RuntimeError(
            f"bench: {mixer} differs from its oracle by {worst:.3g} in float64, "
            "which is more than rounding; nothing was timed"
        )
    return worst


def build(mixer: str, seq_len: int, backward: bool, config: dict[str, Any]) -> timing.Built:
    """A side: ``mixer`` on one sequence in float32.  "forward" keeps what a backward pass needs."""
    sizes = from_dict(LMConfig, config)
    x = Inputs.of(sizes, seq_len, torch.float32)

    def run() -> Iterator[str]:
        out = RUN[mixer](x)
        yield PASSES[0]
        if backward:
            torch.autograd.grad(out, x.leaves(mixer), x.d_out)
            yield PASSES[1]

    work = attention_flops(sizes, mixer, seq_len)
    return timing.Built(run, {PASSES[0]: work, PASSES[1]: TRAINING * work})


def sides(
    config: LMConfig, seq_len: int, mixers: Sequence[str], blocks: Sequence[int],
    repeats: tuple[int, int], backward: bool,
) -> list[timing.Side]:  # fmt: skip
    """One for each of ``mixers``, of "vq" one for each of ``blocks``.

    ``repeats``: of each, and of quadratic ones at more than ``LONG`` tokens.
    """
    made = []
    for mixer in mixers:
        n = repeats[0] if mixer in OWN or seq_len <= LONG else min(repeats)
        for block in blocks if mixer == "vq" else [config.block]:
            settings = {
                "mixer": mixer, "seq_len": seq_len, "backward": backward,
                "config": dataclasses.asdict(dataclasses.replace(config, block=block)),
            }  # fmt: skip
            facts = {"block": block} if mixer == "vq" else {}
            label = f"vq block={block}" if mixer == "vq" and len(blocks) > 1 else ""
            made.append(timing.Side(mixer, f"{__name__}:build", settings, n, facts, label))
    return made


def attention_rows(
    plan: timing.Plan,
    config: LMConfig = SIZES,
    lengths: Sequence[int] = LENGTHS,
    *,
    mixers: Sequence[str] = ("vq", "sdpa"),
    blocks: Sequence[int] = (),
    repeats: tuple[int, int] = (timing.REPEATS, 1),
    max_quadratic: int | None = None,
    forward_from: int = FORWARD_FROM,
) -> tuple[list[timing.Row], list[float]]:
    """Rows of all ``mixers`` at all ``lengths`` in tokens, and the rates of the limit.

    Args:
        plan: how to measure.
        config: heads, widths, codes, window, block, entries, chunk and rules.
        blocks: block lengths of "vq" to compare; none: the one of ``config``.
        repeats: see ``sides``.
        max_quadratic: longest sequence at which quadratic attention is timed; None: any.
        forward_from: from this length on without the backward pass.

    Raises:
        RuntimeError: a mixer is not equal to its oracle.
        ValueError: no lengths, repeats or blocks, or an unknown mixer.
    """
    require_some(lengths, repeats, blocks)
    for mixer in mixers:
        require_known("mixer", mixer, RUN)
        if mixer in _ORACLES:
            check_equivalence(mixer)
    rows, rates = [], []
    for seq_len in lengths:
        most = seq_len if max_quadratic is None else max_quadratic
        there = [mixer for mixer in mixers if mixer in OWN or seq_len <= most]
        compared = sides(
            config, seq_len, there, blocks or [config.block], repeats, seq_len < forward_from
        )
        found, more = plan.rows(compared, seq_len, seq_len)
        rows += found
        rates += more
    return rows, rates


def require_some(
    lengths: Sequence[int], repeats: Sequence[int], blocks: Sequence[int] = ()
) -> None:
    """Nothing, if there is something to time.

    Raises:
        ValueError: there isn't.
    """
    if min([*repeats, *blocks]) < 1 or not lengths or min(lengths) < 1:
        raise ValueError(
            f"bench: got lengths={list(lengths)}, repeats={list(repeats)} and "
            f"blocks={list(blocks)}; want at least one length of at least one token, at least one "
            "repeat, and blocks of at least one token"
        )


def best_blocks(rows: Sequence[timing.Row]) -> dict[int, int]:
    """The block length of "vq" with the least median time, by length, of the longest pass."""
    best: dict[int, timing.Row] = {}
    for row in rows:
        if row.mixer != "vq" or "block" not in row.facts:
            continue
        old = best.setdefault(row.seq_len, row)
        # The longest pass has the longest name.
        if (-len(row.pass_), row.ms_median) < (-len(old.pass_), old.ms_median):
            best[row.seq_len] = row
    return {seq_len: row.facts["block"] for seq_len, row in best.items()}


def run(args: argparse.Namespace, pairs: dict[str, str]) -> dict[str, Any]:
    """Times, prints a table and returns all of it; ``pairs``: sizes of the command line.

    Raises:
        ValueError: settings or names that don't exist.
    """
    config = override(SIZES, pairs)
    if unread := [name for name in pairs if name not in READ]:
        raise ValueError(
            f"bench attention does not read {unread[0]}, which is for model, official and decode; "
            f"its sizes are {', '.join(READ)}"
        )
    mixers = [*(args.mixers or ["vq"]), *(PEERS if args.against is None else args.against)]
    plan = timing.Plan(
        "attention", matmul_rate, timing.CLOCKS[args.clock], args.memory,
        lambda row: print(timing.line(row, "sdpa"), flush=True),
    )  # fmt: skip
    repeats = args.repeats or timing.REPEATS
    rows, rates = attention_rows(
        plan, config, sorted(args.lengths or LENGTHS), mixers=mixers, blocks=args.blocks or [],
        repeats=(repeats, args.repeats_long), max_quadratic=args.max_quadratic,
        forward_from=args.forward_from,
    )  # fmt: skip
    names = ("n_head", "kv_heads", "d_k", "d_v", "n_code", "window", "n_entry", "chunk")
    result: dict[str, Any] = {
        "sizes": {name: getattr(config, name) for name in names},
        "limit": {"of": "float32 matrix product, GFLOP/s", **summary(rates)},
        "rows": [row.json() for row in rows],
    }
    if args.blocks:
        result["best_block"] = best_blocks(rows)
        for seq_len, block in result["best_block"].items():
            print(f"best block at {seq_len} tokens: {block}")
    return result
