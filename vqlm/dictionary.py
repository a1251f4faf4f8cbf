"""The rules by which OVQ-attention's dictionaries grow, take in tokens and are read.

Each kind of rule is a small function in a table by name, the paper's first: ``GROWTH`` (how many
entries there should be), ``FOUNDERS`` (which tokens become new ones), ``READS`` (what a query
compares itself with).  ``Rules`` is one choice of all of them.  Nothing here carries a gradient
but ``READS``, and nothing here knows about time beyond one chunk.

Axes: B batch, G key-value head, L chunk, N entries, K key width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqlm.config import FILINGS, LMConfig, require_known

Sizes = Int[Tensor, " B"]


def _plateau(n_token: Sizes, n_entry: int, span: int) -> Sizes:
    return n_entry * n_token // (n_token + n_entry)


def _exponential(n_token: Sizes, n_entry: int, span: int) -> Sizes:
    return (n_entry * (1 - torch.exp(-2 * n_token.double() / n_entry))).long()


def _eager(n_token: Sizes, n_entry: int, span: int) -> Sizes:
    return n_token.clamp(max=n_entry)


def _linear(n_token: Sizes, n_entry: int, span: int) -> Sizes:
    return n_entry * n_token // span


GROWTH: dict[str, Callable[[Sizes, int, int], Sizes]] = {
    "plateau": _plateau,
    "exponential": _exponential,
    "eager": _eager,
    "linear": _linear,
}
"""Entries wanted after so many tokens.  "plateau", N t / (t + N), is the paper's; "exponential",
N (1 - exp(-2 t / N)), grows faster at first; "eager" makes every token an entry until N; "linear"
gets to N after ``span`` tokens."""


def dictionary_size(n_token: Sizes, n_entry: int, growth: str, span: int = 16384) -> Sizes:
    """Entries wanted after ``n_token`` tokens: at least 1, at most N and ``n_token``."""
    wanted = GROWTH[growth](n_token, n_entry, span)
    return wanted.clamp(max=n_entry).minimum(n_token).clamp(min=1)


class Candidates(NamedTuple):
    """A full chunk, and how it resembles what is known, as inner products of keys."""

    to_old: Float[Tensor, "B G L"]
    """With the mean key of the entry that is most like it; -inf where there is none."""
    to_chunk: Float[Tensor, "B G L L"]
    """With each other."""
    position: Int[Tensor, " B"]
    """Tokens of the document before the chunk."""
    n_new: Int[Tensor, " B"]
    """How many of the tokens are to become entries."""


def _spread(c: Candidates, seed: int) -> Bool[Tensor, "B G L"]:
    chunk = c.to_chunk.shape[-1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=c.to_old.device).triu()
    familiarity = c.to_chunk.masked_fill(later, -torch.inf).amax(-1).maximum(c.to_old)
    return _lowest(familiarity, c.n_new)


def _random(c: Candidates, seed: int) -> Bool[Tensor, "B G L"]:
    return _lowest(noise(c.position, c.to_chunk.shape[1], c.to_chunk.shape[2], seed), c.n_new)


def _first(c: Candidates, seed: int) -> Bool[Tensor, "B G L"]:
    place = torch.arange(c.to_chunk.shape[-1], device=c.to_old.device)
    return (place < c.n_new[:, None, None]).expand(c.to_chunk.shape[:-1])


def _kmeans_plus_plus(c: Candidates, seed: int) -> Bool[Tensor, "B G L"]:
    known = c.to_old.clamp(min=-1)
    draws = noise(c.position, c.to_chunk.shape[1], c.to_chunk.shape[2], seed).to(known.dtype)
    founds = torch.zeros_like(known, dtype=torch.bool)
    for step in range(int(c.n_new.max())):
        # |k - m|^2 of vectors of length 1; what is taken isn't taken twice.
        share = (2 - 2 * known).clamp(min=1e-9).masked_fill(founds, 0).cumsum(-1)
        pick = torch.searchsorted(share, draws[..., step, None] * share[..., -1:], right=True)
        pick = pick.clamp(max=share.shape[-1] - 1)
        now = (step < c.n_new)[:, None, None]
        founds = founds.scatter(-1, pick, now | founds.gather(-1, pick))
        to_pick = c.to_chunk.gather(-1, pick[..., None].expand(*known.shape, 1))[..., 0]
        known = torch.where(now, known.maximum(to_pick), known)
    return founds


FOUNDERS: dict[str, Callable[[Candidates, int], Bool[Tensor, "B G L"]]] = {
    "spread": _spread,
    "random": _random,
    "first": _first,
    "kmeans++": _kmeans_plus_plus,
}
"""Which tokens of a full chunk become entries.  "spread", the paper's in spirit: those least
similar to every entry and to the chunk's earlier tokens; "first": the first ones; "random": any;
"kmeans++": one after another, with probability as the squared distance to the nearest entry.
The last two draw from the ``seed`` and the token's position, so that any cutting of a stream into
calls draws the same."""


def _lowest(score: Float[Tensor, "B G L"], n: Int[Tensor, " B"]) -> Bool[Tensor, "B G L"]:
    """True at the ``n`` lowest of each row, the earlier of two equals."""
    return score.argsort(dim=-1, stable=True).argsort(-1) < n[:, None, None]


def noise(
    position: Int[Tensor, " B"], n_head: int, chunk: int, seed: int
) -> Float[Tensor, "B G L"]:
    """Numbers in [0, 1), float64, that look drawn; those of a token depend on its position, its
    head and ``seed`` alone.  (SplitMix64's finisher, in int64 that wraps around.)"""
    device = position.device
    x = position[:, None, None] + torch.arange(chunk, device=device)
    x = x + (torch.arange(n_head, device=device)[:, None] + (seed << 20)) * 0x9E3779B97F4A7C1
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 11) & ((1 << 53) - 1)).double() / 2.0**53


class Read(NamedTuple):
    """How an entry is read: with weight count * exp(beta (q.a + a')), where [a, a'] is what
    ``centre`` makes of the entry's sum of keys and its count, or [a] without a'."""

    centre: Callable[[Float[Tensor, "... N K"], Float[Tensor, "... N"]], Float[Tensor, "... N A"]]
    has_bias: bool
    """Whether there is an a'."""


def mean_of(total: Float[Tensor, "... N K"], count: Float[Tensor, "... N"]) -> Tensor:
    """Sums over counts, [..., N, K]; zeros where nothing is."""
    return total * count.clamp(min=1).reciprocal()[..., None]


def _renormalised(key_sum: Tensor, count: Tensor) -> Tensor:
    return key_sum * key_sum.norm(dim=-1, keepdim=True).clamp(min=1e-6).reciprocal()


def _gaussian(key_sum: Tensor, count: Tensor) -> Tensor:
    mean = mean_of(key_sum, count)
    return torch.cat([mean, (1 - mean.square().sum(-1, keepdim=True)) / 2], -1)


READS: dict[str, Read] = {
    "renormalised": Read(_renormalised, False),
    "mean": Read(mean_of, False),
    "gmr": Read(_gaussian, True),
}
"""What a query is compared with: the mean key scaled to length 1; the mean key m as it is; or m by
the density of a Gaussian of variance 1 / beta around it, exp(-beta |q - m|^2 / 2), which for q of
length 1 is beta (q.m + (1 - |m|^2) / 2) and a constant."""


class Rules(NamedTuple):
    """One choice of every rule."""

    growth: str = "plateau"
    """A key of ``GROWTH``."""
    span: int = 16384
    """Tokens after which "linear" growth has come to N."""
    founders: str = "spread"
    """A key of ``FOUNDERS``."""
    filing: str = "join"
    """"join": what founds no entry joins the most similar one; "merge": see ``merge``."""
    rate: float | None = None
    """How far an entry moves towards what is filed under it; None: 1 / count, so that it is the
    mean of all that ever was.  A number r: n tokens move it by a share of 1 - (1 - r)^n."""
    read: str = "renormalised"
    """A key of ``READS``."""
    seed: int = 0
    """Of "random" and "kmeans++" founders."""

    @classmethod
    def of(cls, config: LMConfig) -> Rules:
        """Those of a model."""
        return cls(
            config.growth, config.growth_span, config.founders, config.filing, config.entry_rate,
            config.entry_read,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ValueError for an unknown name, or a rate that there can't be."""
        require_known("growth", self.growth, GROWTH)
        require_known("founders", self.founders, FOUNDERS)
        require_known("filing", self.filing, FILINGS)
        require_known("read", self.read, READS)
        if self.span < 1:
            raise ValueError(f"span={self.span}, but it must be at least 1 token")
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate}, but it must be in (0, 1), or None for 1 / count")
        if self.rate is not None and self.filing == "merge":
            raise ValueError(f"rate={self.rate}, but filing='merge' wants means; use rate=None")

    def size(self, n_token: Sizes, n_entry: int) -> Sizes:
        """``dictionary_size`` by these rules."""
        return dictionary_size(n_token, n_entry, self.growth, self.span)


STEP = 2.0**-14
"""Similarities and costs are compared in steps of this, so that the first of equals is the same
however a product is rounded: equal tokens have equal keys, in calls of any length."""


def assign(
    key: Float[Tensor, "B G L K"],
    mean: Float[Tensor, "B G N K"],
    n_used: Int[Tensor, " B"],
    position: Int[Tensor, " B"],
    n_new: Int[Tensor, " B"],
    rules: Rules,
) -> Int[Tensor, "B G L"]:
    """The entry that each token of a full chunk is filed under.

    ``n_new`` founders become the entries ``n_used`` and on; every other token joins the entry,
    old or new, whose mean has the largest inner product with it, the first of equals (``STEP``).
    ``mean``: those in use in any row; what single rows don't use of them is told by ``n_used``.
    """
    n_old, most_new = mean.shape[2], int(n_new.max())
    steps = key / STEP
    to_old = (steps @ mean.mT).round_()
    if n_old > int(n_used.min()):
        unused = torch.arange(n_old, device=key.device) >= n_used[:, None]
        to_old = to_old.masked_fill_(unused[:, None, None], -torch.inf)
    if n_old:
        best, entry = to_old.max(-1)
    else:
        best = key.new_full(key.shape[:-1], -torch.inf)
        entry = torch.zeros_like(best, dtype=torch.long)
    if not most_new:
        return entry
    to_chunk = (steps @ key.mT).round_()
    candidates = Candidates(best * STEP, to_chunk * STEP, position, n_new)
    founds = FOUNDERS[rules.founders](candidates, rules.seed)
    # Founders first, in the order of their places; what a row has less of them is masked.
    place = founds.int().argsort(dim=-1, descending=True, stable=True)[..., :most_new]
    to_new = to_chunk.gather(-1, place[:, :, None].expand(*key.shape[:3], -1))
    rank = torch.arange(most_new, device=key.device)
    to_new = to_new.masked_fill_((rank >= n_new[:, None])[:, None, None], -torch.inf)
    best_new, new = to_new.max(-1)
    entry = torch.where(best_new > best, n_used[:, None, None] + new, entry)
    return torch.where(founds, n_used[:, None, None] + founds.cumsum(-1) - 1, entry)


def merge(
    key: Float[Tensor, "B G L K"],
    mean: Float[Tensor, "B G N K"],
    count: Float[Tensor, "B G N"],
    n_used: Int[Tensor, " B"],
    n_new: Int[Tensor, " B"],
) -> tuple[Int[Tensor, "B G N"], Int[Tensor, "B G L"]]:
    """Where each old entry and each token of a full chunk goes, if both may be merged.

    Of all of them, entries first, those whose merger with an earlier one costs least are merged
    with it, as many as must be for ``n_used + n_new`` to remain, the first of equals (``STEP``).
    The cost is Ward's (1963), by which the sum of squared distances to the means grows:
    |m - m'|^2 c c' / (c + c').  Whoever merges with one that merges goes where that goes.  Entries
    keep their order, without gaps; what is unused stays where it is.  ``mean``, ``count``: as
    ``mean`` of ``assign``.
    """
    n_old, chunk = mean.shape[2], key.shape[2]
    m = torch.cat([mean, key], 2)
    square, one = m.square().sum(-1, keepdim=True), torch.ones_like(m[..., :1])
    cost = torch.cat([-2 * m, square, one], -1) @ torch.cat([m, one, square], -1).mT
    share = torch.cat([count, torch.ones_like(key[..., 0])], -1).clamp(min=1).reciprocal()
    cost.div_(STEP * (share[..., None] + share[..., None, :])).round_()
    index = torch.arange(n_old + chunk, device=key.device)
    unused = ((index >= n_used[:, None]) & (index < n_old))[:, None]
    cost.masked_fill_(index >= index[:, None], torch.inf)
    if bool(unused.any()):
        cost.masked_fill_(unused[..., None] | unused[..., None, :], torch.inf)
    least, partner = cost.min(-1)
    gone = _lowest(least, chunk - n_new)
    target = torch.where(gone, partner, index)
    # Partners are earlier, so pointers end; each round doubles how far they have been followed.
    for _ in range(len(index).bit_length()):
        target = target.gather(-1, target)
    # A row whose chunk isn't full files nothing, yet what it gets must be an index.
    place = ((~gone & ~unused).cumsum(-1) - 1).clamp(min=0)
    place = torch.where(unused, index, place.gather(-1, target))
    return place[..., :n_old], place[..., n_old:]
