"""Padding and document boundaries, worked out once per call and shared by every mixer.

Padded rows are *packed*: their real tokens move to the left, in order, so that a mixer only ever
sees rows that end early.  Whatever the pattern of padding was, distances between tokens are then
the distances that a row has alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vqlm.sequence_parallel import Cut


class Segments(NamedTuple):
    """Where the real tokens of a packed batch are, and where their documents begin."""

    lengths: Int[Tensor, " B"] | None = None
    """Real tokens of each packed row; None: all of them."""
    starts: Bool[Tensor, "B T"] | None = None
    """True at the first token of a document, in packed order; None: no document begins here."""
    order: Int[Tensor, "B T"] | None = None
    """Index in the unpacked row of each packed token; None: nothing was moved."""
    mask: Bool[Tensor, "B T"] | None = None
    """The mask as it was given, True at real tokens."""
    learned: Bool[Tensor, "B T"] | None = None
    """True at tokens that codebooks learn from, in packed order; None: all real ones."""
    cut: Cut | None = None
    """Where the rest of these sequences is, if they are parts of longer ones; None: they are not.
    States that a mixer gets then are of before the first part, but for their lengths."""

    @classmethod
    def of(
        cls,
        mask: Bool[Tensor, "B T"] | None = None,
        starts: Bool[Tensor, "B T"] | None = None,
        learned: Bool[Tensor, "B T"] | None = None,
    ) -> Segments:
        """From ``mask``, True at real tokens in any pattern; ``starts``, True at the first real
        token of each document; ``learned``, True where keys count for commitment loss and codebook
        statistics.  What is flagged on padding is ignored in both."""
        if mask is None:
            return cls(starts=starts, learned=learned)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        if starts is not None:
            starts = (starts & mask).gather(1, order)
        if learned is not None:
            learned = (learned & mask).gather(1, order)
        return cls(mask.sum(1), starts, order, mask, learned)

    @property
    def plain(self) -> bool:
        """Whether there is neither padding nor, as far as the host knows, a new document."""
        return self.lengths is None and self.starts is None and self.cut is None

    def pack(self, x: Tensor) -> Tensor:
        """Moves the real tokens of ``x`` [B, T, ...] to the left of their rows."""
        return x if self.order is None else _gather(x, self.order)

    def unpack(self, y: Tensor) -> Tensor:
        """Undoes ``pack`` for ``y`` [B, T, ...], with zeros at the padding."""
        if self.order is None or self.mask is None:
            return y
        y = _gather(y, self.order.argsort(dim=1))
        return y.masked_fill(~self.mask.reshape(self.mask.shape + (1,) * (y.ndim - 2)), 0)

    def valid(self, n_token: int, device: torch.device) -> Bool[Tensor, "#B T"]:
        """True at the real tokens of the packed rows, of ``n_token`` tokens each."""
        index = torch.arange(n_token, device=device)[None]
        return index < (n_token if self.lengths is None else self.lengths[:, None])

    def n_real(self, like: Int[Tensor, " B"], n_token: int) -> Int[Tensor, " B"]:
        """Real tokens of each of the packed rows, of ``n_token`` tokens each."""
        return self.lengths if self.lengths is not None else torch.full_like(like, n_token)

    def learnable(self, n_token: int, device: torch.device) -> Bool[Tensor, "#B T"]:
        """True at the tokens of the packed rows that codebooks learn from."""
        return self.valid(n_token, device) if self.learned is None else self.learned

    def documents(self, batch_size: int, n_token: int, device: torch.device) -> Tensor:
        """Int64 [B, T]: documents that began in this call up to and including each token."""
        if self.starts is None:
            return torch.zeros(batch_size, n_token, dtype=torch.long, device=device)
        return self.starts.cumsum(1)

    def joined_documents(
        self, length: Int[Tensor, " B"], n_slot: int, n_token: int
    ) -> Int[Tensor, "B joined"]:
        """``documents`` of the ``n_slot`` tokens before the call and then its own: 0 for those of
        the document of which ``length`` tokens have been seen, -1 for slots without a token."""
        age = torch.arange(n_slot, 0, -1, device=length.device)
        before = (age <= length[:, None]).long() - 1
        return torch.cat([before, self.documents(len(length), n_token, length.device)], 1)

    def newest_document(
        self, batch_size: int, n_token: int, device: torch.device
    ) -> Int[Tensor, " B"]:
        """Document of each row's last real token; 0 where there is none."""
        documents = self.documents(batch_size, n_token, device)
        if self.lengths is None:
            return documents[:, -1]
        return (documents * self.valid(n_token, device)).amax(1)

    def positions(self, length: Int[Tensor, " B"], n_token: int) -> Int[Tensor, "B T"]:
        """Position of each token in its document, when ``length`` tokens of it went before."""
        index = torch.arange(n_token, device=length.device)[None]
        if self.starts is None:
            return length[:, None] + index
        begin = torch.where(self.starts, index, -1).cummax(1).values
        return index - torch.where(begin >= 0, begin, -length[:, None])

    def length_before(self, cut: Cut, length: Int[Tensor, " B"], n_token: int) -> Int[Tensor, " B"]:
        """Tokens of the current document before this part, of ``n_token`` tokens, of sequences
        that are ``cut``; ``length``: before the first part."""
        own = self.advance(torch.zeros_like(length), n_token)
        goes_on = self.newest_document(len(own), n_token, own.device) == 0
        if not cut.is_first:
            return cut.sums_before(own, goes_on)
        return length + cut.sums_before(own + length * goes_on, goes_on)

    def advance(self, length: Int[Tensor, " B"], n_token: int) -> Int[Tensor, " B"]:
        """Tokens of the current document once this call's ``n_token`` have been seen."""
        n_real = self.n_real(length, n_token)
        if self.starts is None:
            return length + n_real
        index = torch.arange(n_token, device=length.device)[None]
        begin = torch.where(self.starts, index, -1).amax(1)
        return n_real - torch.where(begin >= 0, begin, -length)


def last_slots(
    x: Tensor, n_slot: int, n_token: int, lengths: Int[Tensor, " B"] | None, dim: int
) -> Tensor:
    """The ``n_slot`` newest entries along ``dim`` of ``x`` = [older slots, ``n_token`` tokens].

    With ``lengths`` (real tokens a row, the rest is padding on the right) each row's own newest;
    what a row has too few of is filled up on the left with anything.
    The result is a copy: a state must not keep a whole call's tensors alive.
    """
    n_old = x.shape[dim] - n_token
    if lengths is None:
        return x.narrow(dim, n_old + n_token - n_slot, n_slot).clone()
    index = (lengths + n_old - n_slot)[:, None] + torch.arange(n_slot, device=x.device)
    index = index.clamp(min=0)
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    target = list(x.shape)
    target[dim] = n_slot
    return x.gather(dim, index.reshape(shape).expand(target))


def _gather(x: Tensor, index: Int[Tensor, "B T"]) -> Tensor:
    return x.gather(1, index.reshape(index.shape + (1,) * (x.ndim - 2)).expand_as(x))
