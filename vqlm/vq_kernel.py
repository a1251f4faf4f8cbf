"""VQ-attention block by block, its backward pass written out: O(T d) memory, no softmax kept.

What is computed is in ``vq``; this is how.  The slots hold *sums* of values and counts, so a
query's output is one quotient of plain sums over recent keys j and codes s:

    o = (sum_j P_j v_j + sum_s P_s sum_v_s) / (sum_j P_j + sum_s P_s n_s) ,   P = exp(score)

and neither log(count) nor a mean is needed.  Nor is a maximum: normalised queries and keys bound a
score, and where the bound (which the learned biases can lift) leaves the range of the number
format, the largest score of a query is subtracted after all.

Forward keeps q, v, codes, o, the denominators, and what the slots hold at every ~sqrt(N)-th of the
N blocks.
Backward takes the blocks in reverse, computes their scores and slots again, and uses

    g = do / den ,  e = -(do . o) / den ,  dP = g v^T + e ,  dscore = P dP .

Codes are constants, so a slot's score gives its gradient to the query alone.  A value's gradient
through the slots is what their sums' gradient has grown to when the walk comes to where it was
filed.  Score matrices live in buffers of one block, used again for every block.

Axes: as in ``vq``; W recent keys of a block, N blocks.  [BG, RL, .] are the R L queries of a block
that share a key-value head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqlm.codebook import flat_index
from vqlm.fused import d_normalised, normalised
from vqlm.vq_schedule import Block, Schedule


class Tensors(NamedTuple):
    """What a call is given, in the order in which ``attend`` gives gradients."""

    query: Float[Tensor, "B H T K"]
    """Before they are normalised, if ``attend`` is given a ``scale``."""
    key: Float[Tensor, "B G T K"]
    """Quantized keys.  Only their gradient is used: their values are looked up by code."""
    value: Float[Tensor, "B G T V"]
    content: Float[Tensor, "H K"]
    position: Float[Tensor, "H K"]
    rows: Float[Tensor, "H distances K"]
    memory_key: Float[Tensor, "B G M K"]
    memory_value: Float[Tensor, "B G M V"]
    sums: Float[Tensor, "B G S VN"]
    """Sums of values of the slots, and the counts in one more column."""
    codes: Float[Tensor, "G S K"]
    """A constant."""


def _must_shift(x: Tensors, scale: float | None) -> bool:
    """Whether exp of some score of the call, or the quotient of two, could leave the range of the
    dtype, by an upper bound of all scores."""

    def longest(*tensors: Tensor) -> Tensor:
        return torch.stack([t.norm(dim=-1).max() for t in tensors if t.numel()]).max()

    query = longest(x.query) if scale is None else scale * math.sqrt(x.query.shape[-1])
    content = (query + longest(x.content)) * longest(x.codes, x.memory_key)
    bound = (content + (query + longest(x.position)) * longest(x.rows)).item()
    return 2 * bound > math.log(torch.finfo(x.query.dtype).max)


class _Call:
    """One call's tensors as the products want them, and what forward and backward share."""

    def __init__(self, x: Tensors, schedule: Schedule, shifts: bool, scale: float | None) -> None:
        self.x, self.schedule, self.shifts, self.scale = x, schedule, shifts, scale
        self.batch, self.heads, self.n_token, width = x.query.shape
        self.groups, self.n_code, _ = x.codes.shape
        self.window = schedule.window
        code, slot, order = schedule.code, schedule.slot, schedule.order
        self._code = flat_index(code, self.n_code).view_as(code)
        self._slot = flat_index(slot.flatten(0, 1), self.n_code).view_as(slot)
        self._order = None if order is None else flat_index(order.flatten(0, 1), self.n_code)
        self.codes = self.in_order(x.codes.expand(self.batch, -1, -1, -1))
        # Row m of these is for distance M - m, in the order of the columns of a query.
        rows = x.rows.flip(1).expand(self.batch, -1, -1, -1)
        self.rows = rows.reshape(self.batch * self.heads, self.window + 1, width)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory for a tensor [*shape], the same whenever it is asked for by this name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self.x.query.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def in_order(self, slots: Float[Tensor, "B G S width"]) -> Float[Tensor, "BG S width"]:
        """Codes or slots in the order of the schedule; a copy."""
        if self._order is None:
            return slots.flatten(0, 1).clone()
        rows = slots.flatten(0, 2).index_select(0, self._order)
        return rows.view(self.batch * self.groups, -1, slots.shape[-1])

    def out_of_order(self, slots: Float[Tensor, "BG S width"]) -> Float[Tensor, "B G S width"]:
        """The inverse of ``in_order``."""
        if self._order is None:
            return slots.unflatten(0, (self.batch, -1))
        rows = slots.flatten(0, 1)
        rows = torch.empty_like(rows).index_copy_(0, self._order, rows)
        return rows.view(self.batch, self.groups, *slots.shape[1:])

    def queries(self, block: Block) -> tuple[Tensor, Tensor]:
        """Queries of the block with the content and with the position bias: [BH, L, K]."""
        part = self.x.query[:, :, block.begin : block.end]
        part = part if self.scale is None else normalised(part, self.scale)
        # Side by side in memory, however the query was laid out.
        content, position = (
            torch.add(part, b[:, None], out=part.new_empty(part.shape)).flatten(0, 1)
            for b in (self.x.content, self.x.position)
        )
        return content, position

    def by_group(self, x: Tensor) -> Tensor:
        """[BH, L, .] as [BG, RL, .]."""
        return x.view(self.batch * self.groups, -1, x.shape[-1])

    def keys(self, block: Block) -> Tensor:
        """Quantized recent keys: [BG, W, K]."""
        first, n_memory = block.first, max(0, self.window - block.first)
        code = self._code[:, :, first + n_memory : self.window + block.end]
        keys = self.x.codes.flatten(0, 1).index_select(0, code.flatten())
        keys = keys.view(*code.shape, -1)
        if n_memory:
            keys = torch.cat([self.x.memory_key[:, :, first:], keys], 2)
        return keys.flatten(0, 1)

    def values(self, first: int, end: int) -> Tensor:
        """Values from ``first`` to ``end`` of the joined order: [BG, ., V]."""
        window, x = self.window, self.x
        values = x.value[:, :, max(first - window, 0) : max(end - window, 0)]
        if first < window:
            values = torch.cat([x.memory_value[:, :, first:end], values], 2)
        return values.flatten(0, 1)

    def weights(
        self, index: int, content: Tensor, position: Tensor, keys: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """exp(score) of recent keys [BG, RL, W] and of slots [BG, RL, S], 0 where hidden."""
        block = self.schedule.blocks[index]
        recent = self.buffer("recent", *self.by_group(content).shape[:2], keys.shape[1])
        torch.bmm(self.by_group(content), keys.mT, out=recent)
        self.add_position_scores(block, recent, position)
        slots = None
        if block.n_slot:
            slots = self.buffer("slots", *recent.shape[:2], block.n_slot)
            torch.bmm(self.by_group(content), self.codes[:, : block.n_slot].mT, out=slots)
        if self.shifts:
            self._subtract_largest(index, recent, slots, sums)
        recent.exp_()
        self._hide(block, self._by_query(recent))
        if slots is not None:
            slots.exp_()
            if block.masks_slots:
                self._by_query(slots).mul_(self.schedule.slots_mask(index))
        return recent, slots

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
            values = F.pad(self.values(block.begin, block.end), (0, 1), value=1.0)
            values = self._keep(block, values)
            sums.flatten(0, 1).index_add_(0, self._slot_index(block), values.flatten(0, 1))

    def d_file_(self, index: int, d_sums: Tensor, d_values: Tensor) -> None:
        """Backward of ``file_``: adds to ``d_values`` [BG, joined, V], takes ``d_sums`` back."""
        block = self.schedule.blocks[index]
        if block.files:
            d = d_sums.flatten(0, 1).index_select(0, self._slot_index(block))
            d = self._keep(block, d.view(len(d_values), -1, d.shape[-1]))
            d_values[:, block.begin : block.end] += d
        if block.resets:
            d_sums.view(self.batch, -1).mul_(self.schedule.same_document(index)[:, None])

    def _keep(self, block: Block, x: Tensor) -> Tensor:
        """``x`` [BG, L, .] with 0 at what is not filed."""
        if block.files_all:
            return x
        kept = self.schedule.kept[:, block.begin : block.end, None]
        return (x.unflatten(0, (self.batch, -1)) * kept[:, None]).flatten(0, 1)

    def _slot_index(self, block: Block) -> Tensor:
        return self._slot[:, :, block.begin : block.end].flatten()


class _Attend(torch.autograd.Function):
    """See the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        schedule: Schedule,
        keep: bool,
        cache_grad: bool,
        scale: float | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = Tensors(*tensors)
        call = _Call(x, schedule, _must_shift(x, scale), scale)
        width = x.value.shape[-1]
        # Laid out as [B, T, H, V], so that joining the heads afterwards costs nothing.
        out = x.query.new_empty(call.batch, call.n_token, call.heads, width).transpose(1, 2)
        normaliser = x.query.new_empty(call.batch, call.heads, call.n_token, 1)
        sums = call.in_order(x.sums)
        every, kept = math.isqrt(len(schedule.blocks)), []
        for index, block in enumerate(schedule.blocks):
            if keep and index % every == 0:
                kept.append(sums[:, : block.n_slot].clone())
            content, position = call.queries(block)
            recent, slots = call.weights(index, content, position, call.keys(block), sums)
            total = torch.bmm(recent, call.values(block.first, call.window + block.end))
            norm = recent.sum(-1, keepdim=True)
            if slots is not None:
                of_slots = torch.bmm(slots, sums[:, : block.n_slot])
                total += of_slots[..., :-1]
                norm += of_slots[..., -1:]
            shape = (call.batch, call.heads, -1, width)
            out[:, :, block.begin : block.end] = (total / norm).view(shape)
            normaliser[:, :, block.begin : block.end] = norm.view(*shape[:3], 1)
            call.file_(index, sums)
        if keep:
            # Of the sums only their number is of use.
            none = x._replace(key=x.key.new_empty(0), sums=x.sums.new_empty(*x.sums.shape[:3], 0))
            ctx.save_for_backward(*none, out, normaliser, *kept)
            ctx.schedule, ctx.every, ctx.cache_grad = schedule, every, cache_grad
            ctx.shifts, ctx.scale = call.shifts, scale
            ctx.set_materialize_grads(False)
        return out, call.out_of_order(sums)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: Tensor | None, d_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        n, saved = len(Tensors._fields), ctx.saved_tensors
        x, (out, normaliser, *kept) = Tensors(*saved[:n]), saved[n:]
        call = _Call(x, ctx.schedule, ctx.shifts, ctx.scale)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        wants_sums = ctx.needs_input_grad[Tensors._fields.index("sums") - n]
        grads = _Gradients(call, d_sums, ctx.cache_grad, wants_sums)
        n_block = len(ctx.schedule.blocks)
        for segment in reversed(range(len(kept))):
            begin, end = segment * ctx.every, min((segment + 1) * ctx.every, n_block)
            # What was not kept are slots that nothing had been filed under.
            n_empty = x.sums.shape[2] - kept[segment].shape[1]
            sums = [F.pad(kept[segment], (0, 0, 0, n_empty))]
            for index in range(begin, end - 1):
                sums.append(sums[-1].clone())
                call.file_(index, sums[-1])
            for index in reversed(range(begin, end)):
                grads.add_block(index, sums.pop(), d_out, out, normaliser)
        return None, None, None, None, *grads.result()


class _Gradients:
    """Gradients of all tensors of a call, grown block by block from the last to the first."""

    def __init__(
        self, call: _Call, d_sums: Tensor | None, cache_grad: bool, wants_sums: bool
    ) -> None:
        self.call, self.cache_grad, self.wants_sums = call, cache_grad, wants_sums
        x, groups, joined = call.x, call.batch * call.groups, call.window + call.n_token
        self.query = torch.empty_like(x.query)
        self.key = x.query.new_zeros(groups, joined, x.query.shape[-1])
        self.value = x.value.new_zeros(groups, joined, x.value.shape[-1])
        self.content, self.position = (torch.zeros_like(b) for b in (x.content, x.position))
        self.rows = torch.zeros_like(call.rows)
        if d_sums is None:
            self.sums = x.value.new_zeros(groups, x.sums.shape[2], x.value.shape[-1])
        else:
            self.sums = call.in_order(d_sums[..., :-1])

    def add_block(
        self, index: int, sums: Tensor, d_out: Tensor, out: Tensor, normaliser: Tensor
    ) -> None:
        """Adds what block ``index`` gives; ``sums`` [BG, S, V + 1] are the slots that it read."""
        call = self.call
        block = call.schedule.blocks[index]
        cut = slice(block.begin, block.end)
        if self.cache_grad:
            call.d_file_(index, self.sums, self.value)
        content, position = call.queries(block)
        keys = call.keys(block)
        values = call.values(block.first, call.window + block.end)
        recent, slots = call.weights(index, content, position, keys, sums)
        norm = normaliser[:, :, cut]
        g = (d_out[:, :, cut] / norm).reshape(*recent.shape[:2], -1)
        e = (d_out[:, :, cut] * out[:, :, cut]).sum(-1, keepdim=True).div_(norm).neg_()
        e = e.reshape(*recent.shape[:2], 1)

        d_recent = call.buffer("d_recent", *recent.shape)
        torch.bmm(g, values.mT, out=d_recent).add_(e).mul_(recent)
        d_content = torch.bmm(d_recent, keys)
        self._add_recent(block, d_recent, recent, call.by_group(content), g)
        if slots is not None:
            if self.cache_grad:
                self.sums[:, : block.n_slot] += torch.bmm(slots.mT, g)
            d_slots = call.buffer("d_slots", *slots.shape)
            read = sums[:, : block.n_slot]
            torch.bmm(torch.cat([g, e], -1), read.mT, out=d_slots).mul_(slots)
            d_content.baddbmm_(d_slots, call.codes[:, : block.n_slot])
        self._add_queries(block, d_content, call.d_position_scores(block, d_recent), position)

    def _add_recent(
        self, block: Block, d_scores: Tensor, weights: Tensor, content: Tensor, g: Tensor
    ) -> None:
        end = self.call.window + block.end
        first = block.first if self.cache_grad else self.call.window + block.begin
        columns = slice(first - block.first, None)
        self.key[:, first:end] += torch.bmm(d_scores[..., columns].mT, content)
        self.value[:, first:end] += torch.bmm(weights[..., columns].mT, g)

    def _add_queries(
        self, block: Block, d_content: Tensor, d_scores: Tensor, position: Tensor
    ) -> None:
        call = self.call
        shape = (call.batch, call.heads, block.end - block.begin, -1)
        d_content = d_content.view(shape)
        d_position = torch.bmm(d_scores, call.rows).view(shape)
        self.rows.baddbmm_(d_scores.mT, position)
        d_query = d_content + d_position
        if call.scale is not None:
            part = call.x.query[:, :, block.begin : block.end]
            d_query = d_normalised(part, call.scale, d_query)
        self.query[:, :, block.begin : block.end] = d_query
        self.content += d_content.sum((0, 2))
        self.position += d_position.sum((0, 2))

    def result(self) -> tuple[Tensor | None, ...]:
        """One for each field of ``Tensors``."""
        call, window = self.call, self.call.window
        key, value = (x.unflatten(0, (call.batch, -1)) for x in (self.key, self.value))
        rows = self.rows.unflatten(0, (call.batch, -1)).sum(0).flip(1)
        sums = F.pad(call.out_of_order(self.sums), (0, 1)) if self.wants_sums else None
        return Tensors(
            self.query, key[:, :, window:], value[:, :, window:], self.content, self.position,
            rows, key[:, :, :window], value[:, :, :window],
            sums, None,  # type: ignore[arg-type]
        )  # fmt: skip


def attend(
    x: Tensors, schedule: Schedule, cache_grad: bool, scale: float | None = None
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B G S VN"]]:
    """Outputs of all queries, and the slots after the call (``Tensors.sums``).

    Without ``cache_grad`` keys and values get gradients from queries of their own block alone.
    ``scale``: queries are normalised first, block by block (``fused.normalise``).
    """
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in x)
    if keep:  # what was made in inference mode, a state say, can't be kept for a backward pass
        x = Tensors(*(t.clone() if t.is_inference() else t for t in x))
    with torch.autocast(x.query.device.type, enabled=False):
        out, sums = _Attend.apply(schedule, keep, cache_grad, scale, *x)
    return out, sums
