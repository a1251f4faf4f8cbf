"""What each block of a call of VQ-attention sees and files: integers alone, worked out at once.

Documents, padding and empty slots are all settled here, so that ``vq_kernel`` masks only where
something is hidden.  Axes: as in ``vq``; "joined" is [M memory slots, T tokens].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from vqlm.segments import Segments


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
    sees_slots: bool
    """Whether anything may have been filed before this block."""
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
    document: Int[Tensor, "B joined"]
    """Document of the call that each belongs to, 0 being the state's; -1: an empty slot."""
    kept: Bool[Tensor, "B T"]
    """Whether the key is filed when it leaves the window: real, and of the slots' new document."""
    slots_document: Int[Tensor, "B boundaries"]
    """Document that the slots hold before each block, and after the last: N + 1 of them."""
    with_slots: bool
    """Whether there is a cache."""
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
        with_slots: bool,
        warm: bool,
    ) -> Schedule:
        """``length``: tokens of the state's document; ``warm``: whether its slots hold any."""
        n_token = code.shape[2] - window
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
        kept = (position < real[:, None]) & (left >= 0) & (left == after) & with_slots
        blocks = _blocks(document, kept, slots_document, window, block, warm)
        return cls(window, code, document, kept, slots_document, with_slots, blocks)

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


def _blocks(
    document: Tensor, kept: Tensor, slots_document: Tensor, window: int, block: int, warm: bool
) -> tuple[Block, ...]:
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
    blocks = []
    for i in range(len(begins)):
        blocks.append(
            Block(
                begins[i], ends[i], firsts[i], masks_recent[i], warm, masks_slots[i],
                files[i], files_all[i], resets[i],
            )
        )  # fmt: skip
        warm = warm or files[i]
    return tuple(blocks)
