"""Where the tokens of a call lie in chunks of L, counted from the start of each document.

A call is laid out as a stream of whole chunks, the first one beginning with what is still open from
earlier calls.  If all rows are in step, which is so without padding and new documents, that takes
no more than putting the open chunk in front.  Else each row's tokens are moved to its own places in
a grid of chunks, with gaps where a row has none.

Axes: B batch, A any heads, T time, L chunk, C chunks, W any width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqlm.segments import Segments

Size = Callable[[Tensor], Tensor]
"""Entries wanted [B] after so many tokens [B]."""


class Chunk(NamedTuple):
    """One chunk of a call: what it reads and what happens at its end."""

    keys: slice
    """Its part of the laid-out keys and values."""
    queries: slice
    """Its part of the laid-out queries."""
    first: int
    """Place in the chunk of the first of those queries."""
    fresh: Bool[Tensor, " B"] | None
    """Rows in which a document begins here, so that what was before is void; None: no row."""
    full: Bool[Tensor, " B"] | None
    """Rows whose chunk is full at the end, and is filed; None: all of them."""
    position: Int[Tensor, " B"]
    """Tokens of the document before the chunk."""
    n_used: Int[Tensor, " B"]
    """Entries in use before the chunk is filed."""
    n_new: Int[Tensor, " B"]
    """Entries that filing it adds."""
    most_used: int
    """The most that any row has in use before."""
    most_grown: int
    """The most that any row has in use after; -1: no row is filed."""

    @property
    def files(self) -> bool:
        """Whether any row's chunk is filed."""
        return self.most_grown >= 0


class Layout(NamedTuple):
    """How a call is laid out, and its chunks."""

    chunks: list[Chunk]
    chunk: int
    """Tokens L of a chunk."""
    n_used: Int[Tensor, " B"]
    """Entries in use after the call."""
    opened: int
    """Tokens of every row in the open chunk, if the rows are in step."""
    grid: Grid | None
    """Where each token lies; None: the rows are in step."""

    def keys(
        self, x: Float[Tensor, "B A T W"], opened: Float[Tensor, "B A L W"]
    ) -> Float[Tensor, "B A CL W"]:
        """The stream of keys, or of values: the open chunk, then the call's tokens ``x``."""
        if self.grid is not None:
            return self.grid.lay_out(x, opened)
        return torch.cat([opened[:, :, : self.opened], x], 2) if self.opened else x

    def queries(self, x: Float[Tensor, "B A T W"]) -> Float[Tensor, "B A Q W"]:
        """The stream of queries."""
        return x if self.grid is None else self.grid.lay_out(x)

    def outputs(self, y: Float[Tensor, "B A Q W"]) -> Float[Tensor, "B A T W"]:
        """Back to the places of the call; zeros at padding."""
        return y if self.grid is None else self.grid.take_back(y)

    def tail(
        self, stream: Float[Tensor, "B A CL W"], opened: Float[Tensor, "B A L W"]
    ) -> Float[Tensor, "B A L W"]:
        """The open chunk after the call, zeros behind its tokens: what a state is depends on the
        text alone, not on which rows were read together."""
        if self.grid is not None:
            return self.grid.tail(stream, opened)
        rest = stream.shape[2] % self.chunk
        # A copy: a state must not keep the whole call's tensors alive.
        return F.pad(stream[:, :, stream.shape[2] - rest :], (0, 0, 0, self.chunk - rest))


def lay_out(
    segments: Segments, length: Tensor, n_used: Tensor, n_token: int, chunk: int, size: Size
) -> Layout:
    """The layout of a call of ``n_token`` tokens after ``length`` [B] of the document in each row.

    ``n_used`` [B]: entries in use before; ``size``: those wanted after so many tokens.
    """
    starts = segments.starts is not None and bool(segments.starts.any())
    padded = segments.lengths is not None and bool((segments.lengths < n_token).any())
    device, length = length.device, length.cpu()
    if not (starts or padded or bool((length != length[0]).any())):
        opened = int(length[0]) % chunk
        places = _in_step(length, opened, n_token, chunk)
        chunks, n_used = _schedule(places, n_used, chunk, size)
        return Layout(chunks, chunk, n_used, opened, None)
    grid = Grid.of(segments, length.to(device), n_token, chunk)
    spans = []
    for c in range(grid.n_chunk):
        begin, (first, last) = c * chunk, grid.columns(c)
        queries = slice(begin + first, begin + last)
        spans.append((slice(begin, begin + chunk), queries, first))
    places = _Places(spans, grid.fresh.cpu(), grid.filled.cpu(), grid.seen.cpu())
    chunks, n_used = _schedule(places, n_used, chunk, size)
    return Layout(chunks, chunk, n_used, 0, grid)


class _Places(NamedTuple):
    spans: list[tuple[slice, slice, int]]
    """``keys``, ``queries`` and ``first`` of each chunk."""
    fresh: Bool[Tensor, "B C"]
    """Whether a document begins with the chunk."""
    filled: Int[Tensor, "B C"]
    """Tokens in the chunk once this call's have come in; 0 where the row has none there."""
    seen: Int[Tensor, "B C"]
    """Tokens of the document up to the end of the chunk."""


def _in_step(length: Int[Tensor, " B"], opened: int, n_token: int, chunk: int) -> _Places:
    """Of rows that all have ``opened`` tokens in their open chunk, and no padding."""
    stop = opened + n_token
    spans, ends = [], []
    for begin in range(0, stop, chunk):
        end, query = min(begin + chunk, stop), max(begin, opened)
        spans.append((slice(begin, end), slice(query - opened, end - opened), query - begin))
        ends.append(end)
    filled = (torch.tensor(ends) - 1) % chunk + 1
    seen = torch.tensor(ends) + (length - opened)[:, None]
    return _Places(spans, torch.zeros_like(seen, dtype=torch.bool), filled.expand_as(seen), seen)


def _schedule(
    places: _Places, n_used: Int[Tensor, " B"], chunk: int, size: Size
) -> tuple[list[Chunk], Int[Tensor, " B"]]:
    """The chunks, and the entries in use after them.  Sizes depend on no key, so that they are
    known beforehand, and on the host."""
    device, used, chunks = n_used.device, n_used.cpu(), []
    for c, (keys, queries, first) in enumerate(places.spans):
        fresh, full = places.fresh[:, c], places.filled[:, c] == chunk
        used = torch.where(fresh, 0, used)
        grown = used.maximum(size(places.seen[:, c])).minimum(used + chunk)
        after = torch.where(full, grown, used)
        chunks.append(
            Chunk(
                keys, queries, first,
                fresh.to(device) if bool(fresh.any()) else None,
                None if bool(full.all()) else full.to(device),
                (places.seen[:, c] - places.filled[:, c]).to(device),
                used.to(device), (after - used).to(device), int(used.max()),
                int(after.max()) if bool(full.any()) else -1,
            )
        )  # fmt: skip
        used = after
    return chunks, used.to(device)


class Grid(NamedTuple):
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
    def of(cls, segments: Segments, length: Int[Tensor, " B"], n_token: int, chunk: int) -> Grid:
        """That of a call of ``n_token`` tokens, when ``length`` of the document went before."""
        position = segments.positions(length, n_token).expand(len(length), -1)
        valid = segments.valid(n_token, length.device).expand_as(position)
        place = position % chunk
        new = (place == 0).cumsum(1)
        # A row that goes on in its open chunk begins there, at chunk 0 of the call.
        index = new - (place[:, :1] == 0).long()
        n_chunk = int(index.masked_fill(~valid, -1).amax()) + 1 if n_token else 0
        at = (index * chunk + place).masked_fill(~valid, n_chunk * chunk)
        spots = position.new_zeros(len(length), n_chunk * chunk + 1)
        occupied = spots.scatter(1, at, 1)[:, :-1].unflatten(1, (n_chunk, chunk)).bool()
        seen = spots.scatter(1, at, position + 1)[:, :-1].unflatten(1, (n_chunk, chunk)).amax(2)
        begins = spots.scatter(1, at, (position == 0).long())[:, :-1]
        begins = begins.unflatten(1, (n_chunk, chunk))
        filled = torch.where(occupied.any(2), (seen - 1) % chunk + 1, 0)
        return cls(index, place, valid, occupied, begins.amax(2).bool(), filled, seen)

    @property
    def n_chunk(self) -> int:
        """Chunks C of the call; 0 if all of it is padding."""
        return self.occupied.shape[1]

    def columns(self, c: int) -> tuple[int, int]:
        """First place of chunk ``c`` at which any row has a new token, and one past the last."""
        used = self.occupied[:, c].any(0).nonzero()[:, 0]
        return int(used[0]), int(used[-1]) + 1

    def _index(self) -> Int[Tensor, "B T"]:
        width = self.occupied.shape[2]
        spare = self.n_chunk * width
        return (self.chunk * width + self.place).masked_fill(~self.valid, spare)

    def lay_out(
        self, x: Float[Tensor, "B A T W"], opened: Float[Tensor, "B A L W"] | None = None
    ) -> Float[Tensor, "B A CL W"]:
        """Puts tokens in their places; elsewhere zeros, in the first chunk what is ``opened``."""
        width = self.occupied.shape[2]
        index = self._index()[:, None, :, None].expand_as(x)
        stream = x.new_zeros(*x.shape[:2], self.n_chunk * width + 1, x.shape[3])
        stream = stream.scatter(2, index, x)[:, :, :-1]
        if opened is None:
            return stream
        new = self.occupied[:, 0, None, :, None]
        begun = torch.where(new, stream[:, :, :width], opened)
        return torch.cat([begun, stream[:, :, width:]], 2)

    def take_back(self, stream: Float[Tensor, "B A CL W"]) -> Float[Tensor, "B A T W"]:
        """Undoes ``lay_out``, with zeros at padding."""
        index = self._index()[:, None, :, None]
        return F.pad(stream, (0, 0, 0, 1)).gather(
            2, index.expand(-1, stream.shape[1], -1, stream.shape[3])
        )

    def tail(
        self, stream: Float[Tensor, "B A CL W"], opened: Float[Tensor, "B A L W"]
    ) -> Float[Tensor, "B A L W"]:
        """The open tokens of each row's last chunk, zeros behind them; ``opened`` where the row has
        no new token."""
        any_new = self.occupied.any(2)
        index = torch.arange(self.n_chunk, device=stream.device)
        last = torch.where(any_new, index, -1).amax(1)
        begin = last.clamp(min=0)[:, None]
        place = torch.arange(opened.shape[2], device=stream.device)
        at = begin * opened.shape[2] + place
        newest = stream.gather(2, at[:, None, :, None].expand_as(opened))
        # A chunk that is full has been filed, and nothing is open.
        closed = place >= self.filled.gather(1, begin) % opened.shape[2]
        newest = newest.masked_fill(closed[:, None, :, None], 0)
        return torch.where((last >= 0)[:, None, None, None], newest, opened)
