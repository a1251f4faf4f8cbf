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

Values in bfloat16 say that all products of matrices be made in it.  What lies between two
products stays in float32, and so do the slots and what their counts give to a denominator.

Codes are constants, so a slot's score gives its gradient to the query alone.  A value's gradient
through the slots is what their sums' gradient has grown to when the walk comes to where it was
filed.  Score matrices live in buffers of one block, used again for every block.

Axes: as in ``vq``; W recent keys of a block, N blocks.  [BG, RL, .] are the R L queries of a block
that share a key-value head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqlm.fused import d_normalised
from vqlm.vq_call import Call, Tensors, must_shift
from vqlm.vq_schedule import Block, Schedule


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
        call = Call(x, schedule, must_shift(x, scale), scale)
        width = x.value.shape[-1]
        # Laid out as [B, T, H, V], so that joining the heads afterwards costs nothing.
        out = x.value.new_empty(call.batch, call.n_token, call.heads, width).transpose(1, 2)
        normaliser = x.codes.new_empty(call.batch, call.heads, call.n_token, 1)
        sums = call.slots_before()
        every, kept = math.isqrt(len(schedule.blocks)), []
        for index, block in enumerate(schedule.blocks):
            if keep and index % every == 0:
                kept.append(sums[:, : block.n_slot].clone())
            content, position = call.queries(block)
            recent, slots = call.weights(index, content, position, call.keys(block), sums)
            values = call.values(block.first, call.window + block.end)
            total = call.product(call.lower(recent, "low_weights"), values, "total")
            norm = recent.sum(-1, keepdim=True)
            if slots is not None:
                call.read(slots, sums[:, : block.n_slot], total, norm)
            shape = (call.batch, call.heads, -1, width)
            out[:, :, block.begin : block.end] = (total / norm).view(shape)
            normaliser[:, :, block.begin : block.end] = norm.view(*shape[:3], 1)
            call.file_(index, sums)
        if keep:
            none = x._replace(key=x.key.new_empty(0), sums=x.sums.new_empty(0))
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
        call = Call(x, ctx.schedule, ctx.shifts, ctx.scale)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        wanted = dict(zip(Tensors._fields, ctx.needs_input_grad[-n:], strict=True))
        wants_state = any(wanted[name] for name in ("memory_key", "memory_value", "sums"))
        grads = _Gradients(call, d_sums, ctx.cache_grad, wants_state)
        n_block = len(ctx.schedule.blocks)
        for segment in reversed(range(len(kept))):
            begin, end = segment * ctx.every, min((segment + 1) * ctx.every, n_block)
            sums = [kept[segment]]
            if end - begin > 1:
                # What was not kept are slots that nothing had been filed under.
                n_empty = x.counts.shape[2] - kept[segment].shape[1]
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
        self, call: Call, d_sums: Tensor | None, cache_grad: bool, wants_state: bool
    ) -> None:
        self.call, self.cache_grad, self.wants_state = call, cache_grad, wants_state
        # Of the joined order, what lies before is not asked for.
        self.first = 0 if wants_state else call.window
        x, groups = call.x, call.batch * call.groups
        joined = call.window + call.n_token - self.first
        self.query = torch.empty_like(x.query)
        self.key = x.codes.new_zeros(groups, joined, x.query.shape[-1])
        self.value = x.codes.new_zeros(groups, joined, x.value.shape[-1])
        self.content, self.position = (torch.zeros_like(b) for b in (x.content, x.position))
        self.rows = torch.zeros_like(call.rows, dtype=call.dtype)
        self.reaches_slots = d_sums is not None
        """Whether ``sums`` is anything but zero."""
        if d_sums is None:
            self.sums = x.codes.new_zeros(groups, x.counts.shape[2], x.value.shape[-1])
        else:
            self.sums = call.in_order(d_sums[..., :-1])

    def add_block(
        self, index: int, sums: Tensor, d_out: Tensor, out: Tensor, normaliser: Tensor
    ) -> None:
        """Adds what block ``index`` gives; ``sums`` [BG, S, V + 1] are the slots that it read."""
        call = self.call
        block = call.schedule.blocks[index]
        cut = slice(block.begin, block.end)
        if self.cache_grad and self.reaches_slots:
            call.d_file_(index, self.sums, self.value, self.first)
        content, position = call.queries(block)
        keys = call.keys(block)
        values = call.values(block.first, call.window + block.end)
        recent, slots = call.weights(index, content, position, keys, sums)
        g = (d_out[:, :, cut] / normaliser[:, :, cut]).to(call.low)
        # From the rounded g: a weight's gradient is the small difference of g v^T and -e.
        e = (g.to(call.dtype) * out[:, :, cut]).sum(-1, keepdim=True).neg_()
        g, e = (t.reshape(*recent.shape[:2], -1) for t in (g, e))

        d_recent = call.product(g, values.mT, "d_recent").add_(e).mul_(recent)
        d_recent = call.lower(d_recent, "low_d")
        d_content = call.product(d_recent, keys, "d_content")
        weights = call.lower(recent, "low_weights")
        self._add_recent(block, d_recent, weights, call.by_group(content), g)
        if slots is not None:
            if self.cache_grad and (self.wants_state or block.begin > self.first):
                weights = call.lower(slots, "low_weights")
                call.add_product(self.sums[:, : block.n_slot], weights.mT, g)
                self.reaches_slots = True
            d_slots = call.d_weights_of_slots(g, e, sums[:, : block.n_slot]).mul_(slots)
            d_slots = call.lower(d_slots, "low_d_slots")
            call.add_product(d_content, d_slots, call.codes[:, : block.n_slot])
        self._add_queries(block, d_content, call.d_position_scores(block, d_recent), position)

    def _add_recent(
        self, block: Block, d_scores: Tensor, weights: Tensor, content: Tensor, g: Tensor
    ) -> None:
        first = block.first if self.cache_grad else self.call.window + block.begin
        first = max(first, self.first)
        columns = slice(first - block.first, None)
        rows = slice(first - self.first, self.call.window + block.end - self.first)
        self.call.add_product(self.key[:, rows], d_scores[..., columns].mT, content)
        self.call.add_product(self.value[:, rows], weights[..., columns].mT, g)

    def _add_queries(
        self, block: Block, d_content: Tensor, d_scores: Tensor, position: Tensor
    ) -> None:
        call = self.call
        shape = (call.batch, call.heads, block.end - block.begin, -1)
        d_content = d_content.view(shape)
        d_position = call.product(d_scores, call.rows, "d_position").view(shape)
        call.add_product(self.rows, d_scores.mT, position)
        d_query = d_content + d_position
        if call.scale is not None:
            part = call.x.query[:, :, block.begin : block.end]
            d_query = d_normalised(part, call.scale, d_query)
        self.query[:, :, block.begin : block.end] = d_query
        self.content += d_content.sum((0, 2))
        self.position += d_position.sum((0, 2))

    def result(self) -> tuple[Tensor | None, ...]:
        """One for each field of ``Tensors``."""
        call, n_token = self.call, self.call.n_token
        key, value = (x.unflatten(0, (call.batch, -1)) for x in (self.key, self.value))
        rows = self.rows.unflatten(0, (call.batch, -1)).sum(0).flip(1)
        memory: tuple[Tensor | None, ...] = (None, None, None)
        if self.wants_state:
            memory = key[:, :, :-n_token], value[:, :, :-n_token], call.out_of_order(self.sums)
        return (
            self.query, key[:, :, -n_token:], value[:, :, -n_token:],
            self.content, self.position, rows, *memory, None, None,
        )  # fmt: skip


def attend(
    x: Tensors, schedule: Schedule, cache_grad: bool, scale: float | None = None
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B G S VN"]]:
    """Outputs of all queries, and the slots after the call: sums, and counts in one more column.

    Without ``cache_grad`` keys and values get gradients from queries of their own block alone.
    ``scale``: queries are normalised first, block by block (``fused.normalise``).
    """
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in x)
    if keep:  # what was made in inference mode, a state say, can't be kept for a backward pass
        x = Tensors(*(t.clone() if t.is_inference() else t for t in x))
    with torch.autocast(x.query.device.type, enabled=False):
        out, sums = _Attend.apply(schedule, keep, cache_grad, scale, *x)
    return out, sums
