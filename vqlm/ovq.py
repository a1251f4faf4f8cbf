"""OVQ-attention (Alonso, Figliolia, Millidge 2026): dictionaries learned in the forward pass.

A mixture of N entries, each a mean key and a mean value with a count, stands for everything older
than the chunk that is open.  Keys and queries have length 1.  Query i reads, with inverse
temperature beta of its head,

    D_s = exp(beta q_i.mu_s)   entry s, mu_s = S_k[s] / |S_k[s]|   (or the mean, S_k[s] / c_s)
    E_j = exp(beta q_i.k_j)    token j <= i of the open chunk

    o_i = (sum_s D_s S_v[s] + sum_j E_j v_j) / (sum_s D_s c_s + sum_j E_j) ,

the conditional mean of a Gaussian mixture whose weights are the counts.  S_k, S_v are sums of keys
and values, c counts; c times the mean is the sum, so no logarithm is needed.

Whenever a chunk of L tokens is full it is *merged*: the dictionary grows to the size that its
schedule has for this many tokens, the chunk's least familiar keys (least similar to every entry
and to the chunk's earlier keys) become entries, every other token joins the most similar one.
Only what a token is assigned to changes.  Assignments carry no gradient, the sums do.

Chunks begin at multiples of L from the start of each document, whatever the calls: L is part of the
mathematics here, other than the block of VQ-attention.  Rows need not be in step: a call is laid
out as a grid of chunks, each row's at its own place.

Axes: B batch, H query head, G key-value head (R = H / G queries share one), T time, L chunk,
N entries, K key width, V value width, C chunks of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqlm.config import LMConfig, require_known
from vqlm.segments import Segments

BETA_START, BETA_MOST = 8.0, 40.0
"""Inverse temperature at first, and the most it may become: exp(-2 * 40) is still a float32."""

Sizes = Int[Tensor, " B"]


def _plateau(n_token: Sizes, n_entry: int) -> Sizes:
    return n_entry * n_token // (n_token + n_entry)


def _exponential(n_token: Sizes, n_entry: int) -> Sizes:
    return (n_entry * (1 - torch.exp(-2 * n_token.double() / n_entry))).long()


def _eager(n_token: Sizes, n_entry: int) -> Sizes:
    return n_token.clamp(max=n_entry)


GROWTH: dict[str, Callable[[Sizes, int], Sizes]] = {
    "plateau": _plateau,
    "exponential": _exponential,
    "eager": _eager,
}
"""Entries wanted after so many tokens.  "plateau", N t / (t + N), is the paper's; "exponential",
N (1 - exp(-2 t / N)), grows faster at first; "eager" makes every token an entry until N."""


def dictionary_size(n_token: Sizes, n_entry: int, growth: str) -> Sizes:
    """Entries wanted after ``n_token`` tokens: at least 1, at most N and ``n_token``."""
    return GROWTH[growth](n_token, n_entry).clamp(max=n_entry).minimum(n_token).clamp(min=1)


class OVQState(NamedTuple):
    """All that OVQ-attention remembers of a stream, however long."""

    key_sum: Float[Tensor, "B G N K"]
    """Sum of the keys of each entry; zeros in entries not yet used."""
    value_sum: Float[Tensor, "B G N V"]
    """Sum of their values."""
    key_count: Float[Tensor, "B G N"]
    """How many there are."""
    key: Float[Tensor, "B G L K"]
    """Keys of the open chunk, its first ``length`` modulo L; what is behind them is arbitrary."""
    value: Float[Tensor, "B G L V"]
    """Their values."""
    n_used: Int[Tensor, " B"]
    """Entries in use, the first ones."""
    length: Int[Tensor, " B"]
    """Tokens of the current document seen so far."""


def initial_state(config: LMConfig, batch_size: int, like: Tensor) -> OVQState:
    """The empty state, on the device of ``like``, in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    groups, n, chunk = config.kv_heads, config.n_entry, config.chunk

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch_size, groups, *shape, dtype=dtype, device=like.device)

    none = torch.zeros(batch_size, dtype=torch.long, device=like.device)
    return OVQState(
        zeros(n, config.d_k), zeros(n, config.d_v), zeros(n), zeros(chunk, config.d_k),
        zeros(chunk, config.d_v), none, none.clone(),
    )  # fmt: skip


def ovq_attention(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G T K"],
    value: Float[Tensor, "B G T V"],
    beta: Float[Tensor, " H"],
    state: OVQState,
    segments: Segments = Segments(),  # noqa: B008  (immutable)
    *,
    growth: str = "plateau",
    renormalised: bool = True,
) -> tuple[Float[Tensor, "B H T V"], OVQState]:
    """Attention over a dictionary learned on the way, and the state after the call.

    Queries and keys are of length 1.  N and L are those of ``state``, which itself is kept.
    ``segments`` describes packed rows: real tokens first.  Outputs at padding are zeros.
    ``growth``: a key of ``GROWTH``.  ``renormalised``: read with mu of length 1, not the mean.

    Raises:
        ValueError: an unknown ``growth``.
    """
    require_known("growth", growth, GROWTH)
    dtype = state.key_sum.dtype
    chunk, n_token = state.key.shape[2], query.shape[2]
    grid = _Grid.of(segments, state.length, n_token, chunk)
    if grid.n_chunk == 0:  # nothing but padding
        return value.new_zeros(*query.shape[:3], value.shape[3]), state
    key, value = (grid.lay_out(x.to(dtype)) for x in (key, value))
    query = grid.lay_out(query.to(dtype))
    dictionary = _Dictionary(*state[:3], state.n_used)
    opened = state.key, state.value
    outputs = []
    for c in range(grid.n_chunk):
        fresh = grid.fresh[:, c]
        dictionary = dictionary.emptied(fresh)
        new = grid.occupied[:, c, None, :, None]
        opened = (torch.where(new, key[:, c], opened[0]), torch.where(new, value[:, c], opened[1]))
        first, last = grid.columns(c)
        read = _read(query[:, c, :, first:last], first, opened, beta, dictionary, renormalised)
        outputs.append(F.pad(read, (0, 0, first, chunk - last)))
        full = grid.filled[:, c] == chunk
        if full.any():
            wanted = dictionary_size(grid.seen[:, c], state.key_count.shape[2], growth)
            dictionary = dictionary.merged(opened, full, wanted)
    length = segments.advance(state.length, n_token)
    out = grid.take_back(torch.stack(outputs, 1))
    return out, OVQState(*dictionary[:3], *opened, dictionary.n_used, length)


class _Grid(NamedTuple):
    """Where the tokens of a call lie in chunks: token t of row b at [b, chunk, place]."""

    chunk: Int[Tensor, "B T"]
    place: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]
    occupied: Bool[Tensor, "B C L"]
    """Whether a new token lies there."""
    fresh: Bool[Tensor, "B C"]
    """Whether a document begins with this chunk, so that the dictionary before is void."""
    filled: Int[Tensor, "B C"]
    """Tokens in the chunk once this call's have come in; 0 where the row has none there."""
    seen: Int[Tensor, "B C"]
    """Tokens of the document up to the end of the chunk."""

    @classmethod
    def of(cls, segments: Segments, length: Tensor, n_token: int, chunk: int) -> _Grid:
        position = segments.positions(length, n_token).expand(len(length), -1)
        valid = segments.valid(n_token, length.device).expand_as(position)
        place = position % chunk
        new = (place == 0).cumsum(1)
        # A row that goes on in its open chunk begins there, at chunk 0 of the call.
        index = new - (place[:, :1] == 0).long()
        n_chunk = int(index.masked_fill(~valid, -1).amax()) + 1
        at = (index * chunk + place).masked_fill(~valid, n_chunk * chunk)
        spots = position.new_zeros(len(length), n_chunk * chunk + 1)
        occupied = spots.scatter(1, at, 1)[:, :-1].unflatten(1, (n_chunk, chunk)).bool()
        seen = spots.scatter(1, at, position + 1)[:, :-1].unflatten(1, (n_chunk, chunk)).amax(2)
        begins = spots.scatter(1, at, (position == 0).long())[:, :-1].unflatten(1, (-1, chunk))
        filled = torch.where(occupied.any(2), (seen - 1) % chunk + 1, 0)
        return cls(index, place, valid, occupied, begins.amax(2).bool(), filled, seen)

    @property
    def n_chunk(self) -> int:
        return self.occupied.shape[1]

    def columns(self, c: int) -> tuple[int, int]:
        """First place of chunk ``c`` at which any row has a new token, and one past the last."""
        used = self.occupied[:, c].any(0).nonzero()[:, 0]
        return int(used[0]), int(used[-1]) + 1

    def _index(self, width: int) -> Tensor:
        spare = self.n_chunk * width
        return (self.chunk * width + self.place).masked_fill(~self.valid, spare)

    def lay_out(self, x: Float[Tensor, "B A T W"]) -> Float[Tensor, "B C A L W"]:
        """Puts tokens in their places, zeros elsewhere."""
        width = self.occupied.shape[2]
        index = self._index(width)[:, None, :, None].expand_as(x)
        grid = x.new_zeros(*x.shape[:2], self.n_chunk * width + 1, x.shape[3]).scatter(2, index, x)
        return rearrange(grid[:, :, :-1], "b a (c l) w -> b c a l w", l=width)

    def take_back(self, grid: Float[Tensor, "B C H L V"]) -> Float[Tensor, "B H T V"]:
        """Undoes ``lay_out``."""
        width = self.occupied.shape[2]
        flat = F.pad(rearrange(grid, "b c h l v -> b h (c l) v"), (0, 0, 0, 1))
        index = self._index(width)[:, None, :, None]
        return flat.gather(2, index.expand(-1, flat.shape[1], -1, flat.shape[3]))


class _Dictionary(NamedTuple):
    key_sum: Float[Tensor, "B G N K"]
    value_sum: Float[Tensor, "B G N V"]
    key_count: Float[Tensor, "B G N"]
    n_used: Int[Tensor, " B"]

    def emptied(self, rows: Bool[Tensor, " B"]) -> _Dictionary:
        """With nothing in the dictionaries of ``rows``."""
        keep = (~rows)[:, None, None]
        return _Dictionary(
            self.key_sum * keep[..., None], self.value_sum * keep[..., None], self.key_count * keep,
            self.n_used * ~rows,
        )  # fmt: skip

    def used(self) -> Bool[Tensor, "B N"]:
        index = torch.arange(self.key_count.shape[2], device=self.key_count.device)
        return index < self.n_used[:, None]

    def merged(
        self, opened: tuple[Tensor, Tensor], full: Bool[Tensor, " B"], wanted: Int[Tensor, " B"]
    ) -> _Dictionary:
        """With the chunk's tokens filed, in the rows whose chunk is ``full``."""
        key, value = opened
        n_used = torch.where(full, torch.maximum(self.n_used, wanted), self.n_used)
        n_used = n_used.minimum(self.n_used + key.shape[2])
        entry = _assign(key.detach(), self, n_used - self.n_used)
        weight = full[:, None, None].to(key.dtype).expand_as(entry)

        def filed(total: Tensor, x: Tensor) -> Tensor:
            index = entry[..., None].expand_as(x)
            return total.scatter_add(2, index, x * weight[..., None])

        return _Dictionary(
            filed(self.key_sum, key), filed(self.value_sum, value),
            self.key_count.scatter_add(2, entry, weight), n_used,
        )  # fmt: skip


@torch.no_grad()
def _assign(
    key: Float[Tensor, "B G L K"], old: _Dictionary, n_new: Int[Tensor, " B"]
) -> Int[Tensor, "B G L"]:
    """The entry that each token of a full chunk is filed under, new ones included."""
    n_entry, chunk = old.key_count.shape[2], key.shape[2]
    mean = old.key_sum / old.key_count.clamp(min=1)[..., None]
    to_old = (key @ mean.mT).masked_fill(~old.used()[:, None, None], -torch.inf)
    to_chunk = key @ key.mT
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril(-1)
    familiarity = torch.cat([to_old, to_chunk.masked_fill(~earlier, -torch.inf)], -1).amax(-1)
    rank = familiarity.argsort(dim=-1, stable=True).argsort(-1)
    founds = rank < n_new[:, None, None]
    new_entry = old.n_used[:, None, None] + founds.cumsum(-1) - 1
    to_founders = to_chunk.masked_fill(~founds[:, :, None], -torch.inf)
    # Ties go to the first: old entries before new ones.
    best = torch.cat([to_old, to_founders], -1).argmax(-1)
    of_founder = new_entry.gather(2, (best - n_entry).clamp(min=0))
    joined = torch.where(best < n_entry, best, of_founder)
    return torch.where(founds, new_entry, joined)


def _read(
    query: Float[Tensor, "B H W K"],
    first: int,
    opened: tuple[Tensor, Tensor],
    beta: Float[Tensor, " H"],
    dictionary: _Dictionary,
    renormalised: bool,
) -> Float[Tensor, "B H W V"]:
    """What the queries at places ``first`` ... of the chunk find."""
    (key, value), groups = opened, opened[0].shape[1]
    n_query, chunk = query.shape[2], key.shape[2]
    if renormalised:
        mu = dictionary.key_sum / dictionary.key_sum.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    else:
        mu = dictionary.key_sum / dictionary.key_count.clamp(min=1)[..., None]
    # Less beta, so that a weight is at most 1; it cancels in the ratio.
    scaled = rearrange(query * beta[:, None, None], "b (g r) w k -> b g r w k", g=groups)
    less = rearrange(beta, "(g r) -> g r 1 1", g=groups)
    to_entries = torch.exp(torch.einsum("bgrwk,bgnk->bgrwn", scaled, mu) - less)
    to_entries = to_entries * dictionary.used()[:, None, None, None]
    to_chunk = torch.exp(torch.einsum("bgrwk,bglk->bgrwl", scaled, key) - less)
    place = torch.arange(chunk, device=query.device)
    own = torch.arange(first, first + n_query, device=query.device)
    to_chunk = to_chunk * (place <= own[:, None])
    total = torch.einsum("bgrwn,bgnv->bgrwv", to_entries, dictionary.value_sum)
    total = total + torch.einsum("bgrwl,bglv->bgrwv", to_chunk, value)
    norm = torch.einsum("bgrwn,bgn->bgrw", to_entries, dictionary.key_count) + to_chunk.sum(-1)
    return (total / norm[..., None]).flatten(1, 2)


class OVQAttention(nn.Module):
    """OVQ-attention with its projections: ``y, state, aux = mixer(x, state)``; aux is None.

    No position is encoded.  Gated layers have SiLU on values and gate, as VQ-attention.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups, k, v = config.n_head, config.kv_heads, config.d_k, config.d_v
        self.widths = [groups * k, groups * v, heads * v if config.gated else 0]
        self.query = nn.Linear(config.d_model, heads * k, bias=False)
        self.key_value_gate = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.output = nn.Linear(heads * v, config.d_model, bias=False)
        self.log_beta = nn.Parameter(torch.full((heads,), math.log(BETA_START)))

    def init_state(self, batch_size: int) -> OVQState:
        """The empty state of ``batch_size`` rows, with the N of the config."""
        return initial_state(self.config, batch_size, self.log_beta)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: OVQState | None = None,
        segments: Segments = Segments(),  # noqa: B008  (immutable)
        with_stats: bool | None = None,
        seed: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], OVQState, None]:
        """Any number of tokens, after those that ``state`` has seen; T = 1 decodes.

        ``with_stats`` and ``seed`` are for other mixers: there is no codebook and no sinusoid.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        key, value, gate = self.key_value_gate(x).split(self.widths, -1)
        query = rearrange(self.query(x), "b t (h k) -> b h t k", k=self.config.d_k)
        key = rearrange(key, "b t (g k) -> b g t k", k=self.config.d_k)
        if self.config.gated:
            value = F.silu(value)
        value = rearrange(value, "b t (g v) -> b g t v", v=self.config.d_v)
        # Scores, dictionary and assignments stay in float32 under autocast.
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.key_sum.dtype
            beta = self.log_beta.to(dtype).exp().clamp(max=BETA_MOST)
            heads, state = ovq_attention(
                F.normalize(query.to(dtype), dim=-1), F.normalize(key.to(dtype), dim=-1),
                value, beta, state, segments, growth=self.config.growth,
            )  # fmt: skip
        joined = rearrange(heads, "b h t v -> b t (h v)").to(x.dtype)
        return self.output(joined * F.silu(gate) if self.config.gated else joined), state, None
