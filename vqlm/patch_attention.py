"""Attention over a dictionary for keys and scores of any size: what other people's models need.

OVQ-attention (ovq.py) takes keys and queries of length 1, so its scores are bounded.  A model that
was trained with softmax attention has neither: its score is a q.k for some scale a.  The same
mixture then reads, with m_s = S_k[s] / c_s the mean key of entry s and u_s the mean of its values,

    o_i = softmax_j [ a q_i.k_j  for recent j ;  a q_i.m_s + log c_s  for entries s ] [ v ; u ]

and a key joins the entry whose mean is nearest in Euclidean distance, which for keys of one length
is the most similar one.  a q.m_s is the mean of the scores of the keys in s, so an entry of one key
has exactly that key's score: with as many entries as tokens, this is softmax attention.

Rotary positions: keys come here turned to their own absolute position, and their means are stored
like that.  The mean of scores holds for turned keys too, so nothing has to be turned back: what an
entry of many keys loses is the fast turning parts, which average out over the positions that it
stands for.  It then knows its place as coarsely as its keys are far apart.

Recent tokens are those of the open chunk and of the W / L chunks before it, W the window; older
chunks of L tokens are filed one at a time.  Instead of learning its entries as it reads, the
dictionary can have fixed ones, a codebook (``codes``), as VQ-attention; or none, a sliding window.

Axes: B batch, H query head, G key-value head (R = H / G queries share one), T time, L chunk,
N entries (or codes), K key width, V value width, C chunks of a call, P = W + L recent slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqlm.chunks import Grid
from vqlm.codebook import nearest_code
from vqlm.dictionary import dictionary_size
from vqlm.segments import Segments


class DictionaryState(NamedTuple):
    """All that is remembered of a stream, however long."""

    key_sum: Float[Tensor, "B G N K"]
    """Sum of the keys of each entry; zeros in entries not yet used."""
    value_sum: Float[Tensor, "B G N V"]
    """Sum of their values."""
    key_count: Float[Tensor, "B G N"]
    """How many there are."""
    key: Float[Tensor, "B G P K"]
    """Recent keys: the last L slots are the open chunk's; slots without a token are arbitrary."""
    value: Float[Tensor, "B G P V"]
    """Their values."""
    n_used: Int[Tensor, " B"]
    """Entries in use, the first ones."""
    length: Int[Tensor, " B"]
    """Tokens seen so far."""


def empty_state(
    key: Float[Tensor, "B G T K"], value: Float[Tensor, "B G T V"], n_entry: int, n_recent: int
) -> DictionaryState:
    """The empty state for keys and values like these, in at least float32."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    batch, groups, _, k = key.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, groups, *shape, dtype=dtype, device=key.device)

    none = torch.zeros(batch, dtype=torch.long, device=key.device)
    v = value.shape[3]
    return DictionaryState(
        zeros(n_entry, k), zeros(n_entry, v), zeros(n_entry), zeros(n_recent, k),
        zeros(n_recent, v), none, none.clone(),
    )  # fmt: skip


def dictionary_attention(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G T K"],
    value: Float[Tensor, "B G T V"],
    state: DictionaryState,
    lengths: Int[Tensor, " B"] | None = None,
    *,
    scale: float,
    chunk: int,
    growth: str = "eager",
    codes: Float[Tensor, "G N K"] | None = None,
    reach: int | None = None,
) -> tuple[Float[Tensor, "B H T V"], DictionaryState]:
    """The outputs, and the state after the call; ``state`` itself is kept.

    Args:
        state: N, P and what has been read; P a multiple of ``chunk``; N 0 for a window alone.
        lengths: real tokens of each row, which come first; None: all.  Outputs at padding are 0.
        scale: factor a on the scores.
        chunk: tokens L filed together; outputs depend on it.
        growth: a key of ``dictionary.GROWTH``; "eager" gives every token an entry of its own until
            all N are used.
        codes: a codebook that stands for the entries' mean keys; None: they are learned.
        reach: tokens before itself that a query sees one by one, at most P - L; None: all
            that are recent.
    """
    dtype, n_token = state.key.dtype, query.shape[2]
    segments = Segments(lengths)
    grid = Grid.of(segments, state.length, n_token, chunk)
    if not grid.n_chunk:  # nothing but padding
        return value.new_zeros(*query.shape[:3], value.shape[3], dtype=dtype), state
    query, key, value = (grid.lay_out(x.to(dtype)).split(chunk, 2) for x in (query, key, value))
    memory = _Memory(*state[:6])
    outputs = []
    for c in range(grid.n_chunk):
        number = state.length // chunk + c
        memory = memory.opened(grid.occupied[:, c, 0], number, chunk, growth, codes)
        memory = memory.written(key[c], value[c], grid.occupied[:, c])
        begin, end = grid.columns(c)
        seen = _seen(number, begin, end, memory.key.shape[2], chunk, reach)
        part = _read(query[c][:, :, begin:end], memory, seen, scale, codes)
        outputs.append(F.pad(part, (0, 0, begin, chunk - end)))
    out = grid.take_back(torch.cat(outputs, 2))
    return out, DictionaryState(*memory, segments.advance(state.length, n_token))


class _Memory(NamedTuple):
    """``DictionaryState`` without the length."""

    key_sum: Tensor
    value_sum: Tensor
    key_count: Tensor
    key: Tensor
    value: Tensor
    n_used: Tensor

    def opened(
        self,
        rows: Bool[Tensor, " B"],
        number: Int[Tensor, " B"],
        chunk: int,
        growth: str,
        codes: Tensor | None,
    ) -> _Memory:
        """With room for chunk ``number`` in ``rows``: the oldest recent chunk is filed there, by
        ``codes`` [G, N, K] if there are any."""
        if not rows.any():
            return self
        n_filed = (number - self.key.shape[2] // chunk + 1) * chunk
        files = rows & (n_filed > 0)
        memory = self
        if self.key_count.shape[2] and files.any():
            memory = self._filed(files, n_filed, chunk, growth, codes)
        moves = rows[:, None, None, None]
        return memory._replace(
            key=torch.where(moves, self.key.roll(-chunk, 2), self.key),
            value=torch.where(moves, self.value.roll(-chunk, 2), self.value),
        )

    def _filed(
        self, rows: Tensor, n_filed: Tensor, chunk: int, growth: str, codes: Tensor | None
    ) -> _Memory:
        key, value = self.key[:, :, :chunk], self.value[:, :, :chunk]
        n_entry, n_used = self.key_count.shape[2], self.n_used
        if codes is not None:
            entry = nearest_code(key, codes)
        else:
            wanted = dictionary_size(n_filed.clamp(min=1), n_entry, growth).maximum(n_used)
            n_used = torch.where(rows, wanted.minimum(n_used + chunk), n_used)
            entry = _assign(key.detach(), self, n_used - self.n_used)
        weight = rows[:, None, None].to(key.dtype).expand_as(entry)

        def filed(total: Tensor, x: Tensor) -> Tensor:
            index = entry[..., None].expand_as(x)
            return total.scatter_add(2, index, x * weight[..., None])

        count = self.key_count.scatter_add(2, entry, weight)
        return _Memory(
            filed(self.key_sum, key), filed(self.value_sum, value), count, self.key, self.value,
            n_used,
        )  # fmt: skip

    def written(self, key: Tensor, value: Tensor, new: Bool[Tensor, "B L"]) -> _Memory:
        """With the new tokens of the open chunk: ``key`` and ``value`` [B, G, L, .]."""
        there = F.pad(new, (self.key.shape[2] - new.shape[1], 0))[:, None, :, None]
        older = (0, 0, self.key.shape[2] - new.shape[1], 0)
        return self._replace(
            key=torch.where(there, F.pad(key, older), self.key),
            value=torch.where(there, F.pad(value, older), self.value),
        )


@torch.no_grad()
def _assign(
    key: Float[Tensor, "B G L K"], old: _Memory, n_new: Int[Tensor, " B"]
) -> Int[Tensor, "B G L"]:
    """The entry that each token of a chunk is filed under; the ``n_new`` farthest found new ones.

    Farthest from every entry and from the chunk's earlier tokens: entries spread over the keys.
    """
    n_entry, chunk = old.key_count.shape[2], key.shape[2]
    mean = old.key_sum / old.key_count.clamp(min=1)[..., None]
    used = torch.arange(n_entry, device=key.device) < old.n_used[:, None]
    far = torch.inf
    to_old = _square_distance(key, mean).masked_fill(~used[:, None, None], far)
    to_chunk = _square_distance(key, key)
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril(-1)
    nearest = torch.cat([to_old, to_chunk.masked_fill(~earlier, far)], -1).amin(-1)
    rank = nearest.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    founds = rank < n_new[:, None, None]
    new_entry = old.n_used[:, None, None] + founds.cumsum(-1) - 1
    to_founders = to_chunk.masked_fill(~founds[:, :, None], far)
    best = torch.cat([to_old, to_founders], -1).argmin(-1)
    of_founder = new_entry.gather(2, (best - n_entry).clamp(min=0))
    return torch.where(founds, new_entry, torch.where(best < n_entry, best, of_founder))


def _square_distance(a: Float[Tensor, "B G L K"], b: Float[Tensor, "B G N K"]) -> Tensor:
    """|a - b|^2 of every pair, [B, G, L, N]."""
    squares = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :]
    return squares - 2 * a @ b.mT


def _seen(
    number: Int[Tensor, " B"], begin: int, end: int, n_recent: int, chunk: int, reach: int | None
) -> Bool[Tensor, "B W P"]:
    """Which recent slots the queries at places ``begin`` ... of the open chunk see."""
    slot = torch.arange(n_recent, device=number.device)
    own = torch.arange(begin, end, device=number.device)[:, None] + n_recent - chunk
    seen = slot <= own
    if reach is not None:
        seen = seen & (own - slot <= reach)
    real = slot >= (n_recent // chunk - 1 - number)[:, None] * chunk
    # A place without a token still sees itself: nothing is divided by 0 there.
    return (seen & real[:, None]) | (slot == own)


def _read(
    query: Float[Tensor, "B H W K"],
    memory: _Memory,
    seen: Bool[Tensor, "B W P"],
    scale: float,
    codes: Tensor | None,
) -> Float[Tensor, "B H W V"]:
    groups = memory.key.shape[1]
    grouped = rearrange(query * scale, "b (g r) w k -> b g r w k", g=groups)
    scores = torch.einsum("bgrwk,bgpk->bgrwp", grouped, memory.key)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if not memory.key_count.shape[2]:
        out = torch.einsum("bgrwp,bgpv->bgrwv", scores.softmax(-1), memory.value)
        return out.flatten(1, 2)
    count = memory.key_count.clamp(min=1)[..., None]
    if codes is None:
        to_entries = torch.einsum("bgrwk,bgnk->bgrwn", grouped, memory.key_sum / count)
    else:
        to_entries = torch.einsum("bgrwk,gnk->bgrwn", grouped, codes.to(grouped.dtype))
    to_entries = to_entries + memory.key_count.log()[:, :, None, None]
    weights = torch.cat([scores, to_entries], -1).softmax(-1)
    of_recent, of_entries = weights.split([scores.shape[-1], to_entries.shape[-1]], -1)
    out = torch.einsum("bgrwp,bgpv->bgrwv", of_recent, memory.value)
    out = out + torch.einsum("bgrwn,bgnv->bgrwv", of_entries, memory.value_sum / count)
    return out.flatten(1, 2)
