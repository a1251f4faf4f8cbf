"""What each block of a call of VQ-attention sees and files: integers alone, worked out at once.

Documents, padding and empty slots are all settled here, so that ``vq_kernel`` masks only where
something is hidden.  Axes: as in ``vq``; "joined" is [M memory slots, T tokens].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqlm.segments import Segments

MOSTLY = 0.75
"""Share of the codes in use in the state, in some row, from which on slots are not put in order."""


class Block(NamedTuple):
    """What one block of queries sees and files, as the host needs to know it."""

    begin: int
    """First token of the block in the call."""
    end: int
    """One past its last token."""
    first: int
    """First recent key, in joined order [M memory slots, T tokens]; those before it are empty."""
    masks_recent: bool
    """Whether some key is hidden from some later query: another document, an empty slot."""
    n_slot: int
    """How many slots, the first in ``Schedule.order``, can hold anything when the block reads."""
    masks_slots: bool
    """Whether the slots are hidden from some query: they are of another document."""
    files: bool
    """Whether a key leaves the window for the slots when the block is done."""
    files_all: bool
    """Whether all that leave do so: no padding, no empty slot, no document that has ended."""
    resets: bool
    """Whether in some row the slots begin anew, for another document."""


@dataclass(frozen=True)
class Schedule:
    """Integer bookkeeping of one call, of all its blocks at once; no gradient passes through it."""

    window: int
    code: Int[Tensor, "B G joined"]
    """Codes of [M memory slots, T tokens]."""
    order: Int[Tensor, "B G S"] | None
    """Codes in the order in which something is first filed under them; those of the state first.
    The slots lie in this order, so that those which a block can leave out are the last ones.
    None: they lie as the codes do."""
    place: Int[Tensor, "B G S"] | None
    """Where each code lies in that order, its inverse; None as there."""
    with_slots: bool
    """Whether there is a cache."""
    slot: Int[Tensor, "B G joined"]
    """Where each of these codes lies in it."""
    document: Int[Tensor, "B joined"]
    """Document of the call that each belongs to, 0 being the state's; -1: an empty slot."""
    kept: Bool[Tensor, "B T"]
    """Whether the key is filed when it leaves the window: real, and of the slots' new document."""
    slots_document: Int[Tensor, "B boundaries"]
    """Document that the slots hold before each block, and after the last: N + 1 of them."""
    blocks: tuple[Block, ...]

    @classmethod
    def of(
        cls,
        code: Int[Tensor, "B G joined"],
        length: Int[Tensor, " B"],
        segments: Segments,
        *,
        window: int,
        block: int,
        count: Float[Tensor, "B G S"],
    ) -> Schedule:
        """``length``: tokens of the state's document; ``count``: of keys in each of its slots, of
        which there are none without a cache."""
        n_token = code.shape[2] - window
        block = max(1, min(block, n_token))  # a longer one is as long, and would take memory
        document = segments.joined_documents(length, window, n_token)
        real = segments.n_real(length, n_token)

        begins = torch.arange(0, n_token, block, device=code.device)
        n_leaving = (real[:, None] - begins).clamp(max=block).clamp(max=n_token - begins)
        newest = document.gather(1, (begins + n_leaving - 1).clamp(min=0))
        newest = torch.where(n_leaving > 0, newest, -1)
        # Documents are numbered in order, so the last one that left is the largest number so far.
        slots_document = F.pad(newest.cummax(1).values.clamp(min=0), (1, 0))
        position = torch.arange(n_token, device=code.device)
        left = document[:, :n_token]
        after = slots_document[:, 1:].repeat_interleave(block, 1)[:, :n_token]
        kept = (position < real[:, None]) & (left >= 0) & (left == after) & (count.shape[2] > 0)
        order, n_slot = _order(code[:, :, :n_token], kept, count, begins)
        place = None if order is None else order.argsort(-1)
        slot = code if place is None else place.gather(2, code)
        blocks = _blocks(document, kept, slots_document, window, block, n_slot)
        return cls(
            window, code, order, place, count.shape[2] > 0, slot, document, kept, slots_document,
            blocks,
        )  # fmt: skip

    def recent_mask(self, block: Block) -> Bool[Tensor, "B 1 L W"]:
        """True where query and recent key are of one document."""
        own = self.document[:, self.window + block.begin : self.window + block.end]
        keys = self.document[:, block.first : self.window + block.end]
        return (own[:, :, None] == keys[:, None, :])[:, None]

    def slots_mask(self, index: int) -> Bool[Tensor, "B 1 L 1"]:
        """True for the queries of block ``index`` that are of the document in the slots."""
        block = self.blocks[index]
        own = self.document[:, self.window + block.begin : self.window + block.end]
        return (own == self.slots_document[:, index, None])[:, None, :, None]

    def same_document(self, index: int) -> Bool[Tensor, " B"]:
        """True where the slots keep what they hold as block ``index`` files its keys."""
        return self.slots_document[:, index] == self.slots_document[:, index + 1]


def _order(
    code: Tensor, kept: Tensor, count: Tensor, begins: Tensor
) -> tuple[Tensor | None, list[int]]:
    """``Schedule.order``, and for each block how many of the slots have been filed under."""
    n_token, n_code = code.shape[2], count.shape[2]
    if n_code == 0:
        return None, [0] * len(begins)
    time = torch.arange(n_token, device=code.device).where(kept, n_token)[:, None].expand_as(code)
    first = torch.where(count > 0, -1, n_token)
    if (count > 0).sum(-1).max() > MOSTLY * n_code:  # nothing to be won
        return None, [n_code] * len(begins)
    first, order = first.scatter_reduce_(2, code, time, "amin").sort(dim=-1, stable=True)
    n_slot = torch.searchsorted(first, begins.expand(*first.shape[:2], -1).contiguous())
    return order, n_slot.amax((0, 1)).tolist()


def _blocks(
    document: Tensor, kept: Tensor, slots_document: Tensor, window: int, block: int,
    n_slot: list[int],
) -> tuple[Block, ...]:  # fmt: skip
    n_token = document.shape[1] - window
    begins = list(range(0, n_token, block))
    ends = [min(begin + block, n_token) for begin in begins]
    n_empty = int((document[:, :window] < 0).sum(1).min())
    firsts = [max(begin, n_empty) for begin in begins]
    # Along a row documents only go up, so a stretch is of one document if its ends are.
    first, last = (
        document[:, torch.tensor(x, device=document.device)]
        for x in (firsts, [window + end - 1 for end in ends])
    )
    masks_recent = (first != last).any(0).tolist()
    own = document[:, torch.tensor([window + begin for begin in begins], device=document.device)]
    before = slots_document[:, :-1]
    masks_slots = ((own != before) | (last != before)).any(0).tolist()
    resets = (before != slots_document[:, 1:]).any(0).tolist()
    padded = F.pad(kept, (0, len(begins) * block - n_token)).unflatten(1, (-1, block))
    n_kept = padded.sum(2)
    files = (n_kept > 0).any(0).tolist()
    lengths = torch.tensor(ends, device=kept.device) - torch.tensor(begins, device=kept.device)
    files_all = (n_kept == lengths).all(0).tolist()
    return tuple(
        Block(
            begins[i], ends[i], firsts[i], masks_recent[i], n_slot[i], masks_slots[i], files[i],
            files_all[i], resets[i],
        )
        for i in range(len(begins))
    )  # fmt: skip
