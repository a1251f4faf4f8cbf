"""What the forward and the backward pass of VQ-attention share: the tensors of one call, cut in
blocks, their products, and the weights of a block.  ``vq_kernel`` says what is computed.

Axes: as in ``vq``; W recent keys of a block, N blocks.  [BG, RL, .] are the R L queries of a block
that share a key-value head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vqlm.codebook import flat_index
from vqlm.fused import normalised
from vqlm.vq_schedule import Block, Schedule


class Tensors(NamedTuple):
    """What a call is given, in the order in which ``attend`` gives gradients."""

    query: Float[Tensor, "B H T K"]
    """Before they are normalised, if ``attend`` is given a ``scale``; then of any dtype."""
    key: Float[Tensor, "B G T K"]
    """Quantized keys.  Only their gradient is used: their values are looked up by code."""
    value: Float[Tensor, "B G T V"]
    """In bfloat16, or as all others are."""
    content: Float[Tensor, "H K"]
    position: Float[Tensor, "H K"]
    rows: Float[Tensor, "H distances K"]
    memory_key: Float[Tensor, "B G M K"]
    memory_value: Float[Tensor, "B G M V"]
    sums: Float[Tensor, "B G S V"]
    """Sums of values of the slots."""
    counts: Float[Tensor, "B G S"]
    """How many there are in each; a constant."""
    codes: Float[Tensor, "G S K"]
    """A constant."""


def must_shift(x: Tensors, scale: float | None) -> bool:
    """Whether exp of some score of the call, or the quotient of two, could leave the range of the
    dtype, by an upper bound of all scores."""

    def longest(*tensors: Tensor) -> Tensor:
        return torch.stack([t.norm(dim=-1).max() for t in tensors if t.numel()]).max()

    query = longest(x.query) if scale is None else scale * math.sqrt(x.query.shape[-1])
    content = (query + longest(x.content)) * longest(x.codes, x.memory_key)
    bound = (content + (query + longest(x.position)) * longest(x.rows)).item()
    return 2 * bound > math.log(torch.finfo(x.codes.dtype).max)


class Call:
    """One call's tensors as the products want them, and what forward and backward share."""

    def __init__(self, x: Tensors, schedule: Schedule, shifts: bool, scale: float | None) -> None:
        self.x, self.schedule, self.shifts, self.scale = x, schedule, shifts, scale
        self.batch, self.heads, self.n_token, width = x.query.shape
        self.groups, self.n_code, _ = x.codes.shape
        self.window = schedule.window
        self.dtype, self.low = x.codes.dtype, x.value.dtype
        code, slot, order = schedule.code, schedule.slot, schedule.order
        self._code = flat_index(code, self.n_code).view_as(code)
        self._slot = flat_index(slot.flatten(0, 1), self.n_code).view_as(slot)
        self._order = None if order is None else flat_index(order.flatten(0, 1), self.n_code)
        self._book = x.codes.flatten(0, 1).to(self.low)
        self.codes = self.in_order(x.codes.expand(self.batch, -1, -1, -1)).to(self.low)
        # Row m of these is for distance M - m, in the order of the columns of a query.
        rows = x.rows.flip(1).expand(self.batch, -1, -1, -1)
        self.rows = rows.reshape(self.batch * self.heads, self.window + 1, width).to(self.low)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a tensor [*shape], the same whenever it is asked for by this name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self.x.codes.new_empty(size, dtype=dtype or self.dtype)
        return self._buffers[name][:size].view(shape)

    def lower(self, x: Tensor, name: str) -> Tensor:
        """``x`` [...] in the dtype of products; its memory is that of this name, or of ``x``."""
        return x if x.dtype == self.low else self.buffer(name, *x.shape, dtype=self.low).copy_(x)

    def product(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a b, of [BG, n, m] and [BG, m, p] in the dtype of products, in the memory of ``name``."""
        out = self.buffer(name, *a.shape[:2], b.shape[2])
        if self.low == self.dtype:
            return torch.bmm(a, b, out=out)
        return out.copy_(torch.bmm(a, b, out=self.buffer("low", *out.shape, dtype=self.low)))

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds a b, of [BG, n, m] and [BG, m, p], to ``out`` [BG, n, p] in place."""
        if self.low == self.dtype:
            out.baddbmm_(a, b)
        else:
            out += torch.bmm(a, b, out=self.buffer("low", *out.shape, dtype=self.low))

    def slots_before(self) -> Float[Tensor, "BG S VN"]:
        """Sums, and counts in one more column, of the slots before the call, in their order."""
        x, first = self.x, self.schedule.blocks[0]
        if not first.n_slot:  # then none of the state's is of use, and zeros need not be sorted
            shape = self.batch * self.groups, x.sums.shape[2], x.sums.shape[3] + 1
            return x.sums.new_zeros(shape)
        return self.in_order(torch.cat([x.sums, x.counts[..., None]], 3))

    def in_order(self, slots: Float[Tensor, "B G S width"]) -> Float[Tensor, "BG S width"]:
        """Codes or slots in the order of the schedule; a copy."""
        if self._order is None:
            return slots.flatten(0, 1).clone()
        rows = slots.flatten(0, 2).index_select(0, self._order)
        return rows.view(self.batch * self.groups, -1, slots.shape[-1])

    def out_of_order(self, slots: Float[Tensor, "BG S width"]) -> Float[Tensor, "B G S width"]:
        """The inverse of ``in_order``."""
        if self.schedule.place is None:
            return slots.unflatten(0, (self.batch, -1))
        place = flat_index(self.schedule.place.flatten(0, 1), self.n_code)
        rows = slots.flatten(0, 1).index_select(0, place)
        return rows.view(self.batch, self.groups, *slots.shape[1:])

    def queries(self, block: Block) -> tuple[Tensor, Tensor]:
        """Queries of the block with the content and with the position bias: [BH, L, K], in the
        dtype of products."""
        x = self.x
        part = x.query[:, :, block.begin : block.end]
        part = part if self.scale is None else normalised(part, self.scale)
        # Side by side in memory, however the query was laid out.
        content, position = (
            torch.add(part, b[:, None], out=x.value.new_empty(part.shape)).flatten(0, 1)
            for b in (x.content, x.position)
        )
        return content, position

    def by_group(self, x: Tensor) -> Tensor:
        """[BH, L, .] as [BG, RL, .]."""
        return x.view(self.batch * self.groups, -1, x.shape[-1])

    def keys(self, block: Block) -> Tensor:
        """Quantized recent keys: [BG, W, K]."""
        first, n_memory = block.first, max(0, self.window - block.first)
        code = self._code[:, :, first + n_memory : self.window + block.end]
        keys = self._book.index_select(0, code.flatten())
        keys = keys.view(*code.shape, -1)
        if n_memory:
            keys = torch.cat([self.x.memory_key[:, :, first:].to(self.low), keys], 2)
        return keys.flatten(0, 1)

    def values(self, first: int, end: int) -> Tensor:
        """Values from ``first`` to ``end`` of the joined order: [BG, ., V]."""
        window, x = self.window, self.x
        values = x.value[:, :, max(first - window, 0) : max(end - window, 0)]
        if first < window:
            values = torch.cat([x.memory_value[:, :, first:end].to(self.low), values], 2)
        return values.flatten(0, 1)

    def weights(
        self, index: int, content: Tensor, position: Tensor, keys: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """exp(score) of recent keys [BG, RL, W] and of slots [BG, RL, S], 0 where hidden."""
        block = self.schedule.blocks[index]
        recent = self.product(self.by_group(content), keys.mT, "recent")
        self.add_position_scores(block, recent, position)
        slots = None
        if block.n_slot:
            codes = self.codes[:, : block.n_slot]
            slots = self.product(self.by_group(content), codes.mT, "slots")
        if self.shifts:
            self._subtract_largest(index, recent, slots, sums)
        recent.exp_()
        self._hide(block, self._by_query(recent))
        if slots is not None:
            slots.exp_()
            if block.masks_slots:
                self._by_query(slots).mul_(self.schedule.slots_mask(index))
        return recent, slots

    def read(self, slots: Tensor, sums: Tensor, total: Tensor, norm: Tensor) -> None:
        """Adds what slots [BG, S, V + 1] of these weights give to the sums [BG, RL, V] of values
        and [BG, RL, 1] of weights."""
        if self.low == self.dtype:
            both = self.product(slots, sums, "of_slots")
            total += both[..., :-1]
            norm += both[..., -1:]
        else:  # it can't count beyond 256
            self.add_product(total, self.lower(slots, "low_weights"), sums[..., :-1].to(self.low))
            norm.baddbmm_(slots, sums[..., -1:])

    def d_weights_of_slots(self, g: Tensor, e: Tensor, sums: Tensor) -> Tensor:
        """Gradient [BG, RL, S] of the weights that ``read`` takes, from those of what it adds to:
        [BG, RL, V] and [BG, RL, 1]."""
        if self.low == self.dtype:
            return self.product(torch.cat([g, e], -1), sums.mT, "d_slots")
        d = self.product(g, sums[..., :-1].to(self.low).mT, "d_slots")
        return d.baddbmm_(e, sums[..., -1:].mT)

    def add_position_scores(self, block: Block, scores: Tensor, position: Tensor) -> None:
        """Adds to ``scores`` [BG, RL, W] what query i gets from the row for the distance of each
        key, M + i - c for column c; nothing beyond the window."""
        by_distance, empty = torch.bmm(position, self.rows.mT), block.first - block.begin
        n_query, width = block.end - block.begin, scores.shape[-1]
        scores = scores.view(self.batch * self.heads, n_query, width)
        if empty == 0:
            self._band(scores).add_(by_distance)
        else:
            n_row = len(scores)
            whole = self.buffer("band", n_row, n_query, width + empty).zero_()
            self._band(whole).copy_(by_distance)
            scores.add_(whole[..., empty:])

    def _band(self, scores: Tensor) -> Tensor:
        """View [BH, L, M + 1] of scores [BH, L, M + L]: of row i the columns from i to i + M."""
        n_row, n_query, width = scores.shape
        return scores.as_strided((n_row, n_query, self.window + 1), (n_query * width, width + 1, 1))

    def d_position_scores(self, block: Block, d_recent: Tensor) -> Tensor:
        """Gradient [BH, L, M + 1] of the products of queries and rows."""
        empty = block.first - block.begin
        d = d_recent.view(self.batch * self.heads, block.end - block.begin, -1)
        return self._band(F.pad(d, (empty, 0)) if empty else d)

    def _by_query(self, scores: Tensor) -> Tensor:
        """[BG, RL, .] as [B, H, L, .]."""
        return scores.view(self.batch, self.heads, -1, scores.shape[-1])

    def _hide(self, block: Block, weights: Tensor) -> None:
        """Puts 0 where a recent key may not be seen; ``weights`` is [B, H, L, W]."""
        empty = block.first - block.begin
        weights.tril_(self.window - empty)
        if not self.schedule.with_slots:
            weights.triu_(-empty)
        if block.masks_recent:
            weights.mul_(self.schedule.recent_mask(block))

    def _subtract_largest(
        self, index: int, recent: Tensor, slots: Tensor | None, sums: Tensor
    ) -> None:
        """Subtracts from each query's scores the largest of those that it may see."""
        block = self.schedule.blocks[index]
        visible = torch.ones_like(recent)
        self._hide(block, self._by_query(visible))
        recent.masked_fill_(visible == 0, -torch.inf)
        largest = recent.amax(-1, keepdim=True)
        if slots is not None:
            slots.masked_fill_(sums[:, None, : block.n_slot, -1] == 0, -torch.inf)
            if block.masks_slots:
                mask = self.schedule.slots_mask(index)
                self._by_query(slots).masked_fill_(~mask, -torch.inf)
            largest = torch.maximum(largest, slots.amax(-1, keepdim=True))
            slots.sub_(largest)
        recent.sub_(largest)

    def file_(self, index: int, sums: Tensor) -> None:
        """Adds to ``sums`` [BG, S, V + 1], in place, what leaves the window after the block."""
        block = self.schedule.blocks[index]
        if block.resets:
            sums.view(self.batch, -1).mul_(self.schedule.same_document(index)[:, None])
        if block.files:
            values = self.values(block.begin, block.end)
            joined = self.buffer("leaving", *values.shape[:2], values.shape[2] + 1)
            joined[..., :-1] = values
            joined[..., -1] = 1.0
            joined = self._keep(block, joined, block.begin)
            slot = self._slot[:, :, block.begin : block.end].flatten()
            sums.flatten(0, 1).index_add_(0, slot, joined.flatten(0, 1))

    def d_file_(self, index: int, d_sums: Tensor, d_values: Tensor, first: int) -> None:
        """Backward of ``file_``: adds to ``d_values`` [BG, ., V], of the joined order from
        ``first`` on, and takes ``d_sums`` back."""
        block = self.schedule.blocks[index]
        begin = max(block.begin, first)
        if block.files and begin < block.end:
            slot = self._slot[:, :, begin : block.end].flatten()
            d = d_sums.flatten(0, 1).index_select(0, slot)
            d = self._keep(block, d.view(len(d_values), -1, d.shape[-1]), begin)
            d_values[:, begin - first : block.end - first] += d
        if block.resets:
            d_sums.view(self.batch, -1).mul_(self.schedule.same_document(index)[:, None])

    def _keep(self, block: Block, x: Tensor, begin: int) -> Tensor:
        """``x`` [BG, ., V], from ``begin`` to the end of the block, with 0 at what is not filed."""
        if block.files_all:
            return x
        kept = self.schedule.kept[:, begin : block.end, None]
        return (x.unflatten(0, (self.batch, -1)) * kept[:, None]).flatten(0, 1)
