"""OVQ-attention over a laid-out stream, forward and backward by hand, in memory linear in time.

Kept for the backward pass: the inputs, the output, one normaliser a query, the entry of each token,
and the dictionary before every sqrt(C)-th of C chunks.  The backward pass walks the chunks in
reverse; it makes the dictionaries of a stretch of sqrt(C) chunks anew, from the kept one and the
entries, which costs a sum a token, and recomputes weights from them.

Weights are held transposed, [keys, queries]: products then have long rows in both passes, and the
normaliser is a row of sums.  With beta <= 40 and vectors of length 1 no weight leaves float32's
range, so that no maximum is subtracted.

Derivatives, with P the weights, den their sum with counts, g = do / den, e = -(do.o) / den: the
gradient of a weight is P * (g.S_v + e c), for a token of the chunk P * (g.v + e).

Axes: M = B G batched heads, R queries a key-value head, W queries of a chunk, n entries in use,
A width of a centre: K, or K + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqlm.chunks import Chunk
from vqlm.dictionary import READS, Read, Rules, assign, mean_of, merge


class Sums(NamedTuple):
    """A dictionary, batched over rows and heads."""

    key: Float[Tensor, "M N K"]
    value: Float[Tensor, "M N V"]
    counts: Float[Tensor, "M N"]

    def first(self, n: int) -> Sums:
        """A view of the first ``n`` entries."""
        return Sums(self.key[:, :n], self.value[:, :n], self.counts[:, :n])

    def copy(self, n: int) -> Sums:
        """The first ``n`` entries as a copy, with zeros in those that there are too few of."""
        made = []
        for x in self:
            y = x.new_zeros(x.shape[0], n, *x.shape[2:])
            y[:, : x.shape[1]] = x[:, :n]
            made.append(y)
        return Sums(*made)

    def where(self, rows: Bool[Tensor, " M"]) -> Sums:
        """With nothing in the dictionaries of the other rows."""
        keep = rows[:, None, None]
        return Sums(self.key * keep, self.value * keep, self.counts * keep[..., 0])


class _Filing(NamedTuple):
    """How a chunk goes into a dictionary: sums' = keep * sums + the tokens times ``weight``."""

    moved: Int[Tensor, " MN"] | None
    """Index of the entry that each old one becomes part of; None: itself."""
    at: Int[Tensor, " ML"]
    """Index of each token's entry among all M n of them."""
    counted: Float[Tensor, "M L"] | None
    """1 where the chunk is filed, else 0; None: everywhere."""
    keep: Float[Tensor, "M N"] | None
    """None: 1."""
    weight: Float[Tensor, "M L"] | None
    """None: 1."""

    @classmethod
    def of(
        cls,
        place: Int[Tensor, "M places"],
        full: Bool[Tensor, " M"] | None,
        count: Float[Tensor, "M N"],
        chunk: int,
        rate: float | None,
    ) -> _Filing:
        """``place``: the entry of each token; before them that of each old entry, or nothing."""
        n_row, n_entry = count.shape
        row = torch.arange(n_row, device=place.device)[:, None]
        entry, n_old = place[:, -chunk:], place.shape[1] - chunk
        at, moved = (entry + n_entry * row).flatten(), None
        if n_old:
            index = torch.arange(n_entry, device=place.device).repeat(n_row, 1)
            stays = index[:, :n_old]
            to = place[:, :n_old]
            index[:, :n_old] = to if full is None else torch.where(full[:, None], to, stays)
            moved = (index + n_entry * row).flatten()
        counted = None if full is None else full[:, None].to(count.dtype).expand_as(entry)
        if rate is None:
            return cls(moved, at, counted, None, counted)
        ones = torch.ones_like(entry, dtype=count.dtype) if counted is None else counted
        new = torch.zeros_like(count).scatter_add_(1, entry, ones)
        share = torch.where(count > 0, 1 - (1 - rate) ** new, (new > 0).to(count.dtype))
        total = count + new
        keep = torch.where(count > 0, total * (1 - share) / count.clamp(min=1), 0)
        weight = (total * share / new.clamp(min=1)).gather(1, entry) * ones
        return cls(moved, at, counted, keep, weight)

    def apply_(
        self, sums: Sums, key: Float[Tensor, "M L K"], value: Float[Tensor, "M L V"]
    ) -> None:
        """Files a chunk in ``sums``, in place."""
        if self.moved is not None:
            for total in sums:
                flat = total.view(len(self.moved), -1)
                flat.copy_(torch.zeros_like(flat).index_add_(0, self.moved, flat))
        for total, x in ((sums.key, key), (sums.value, value)):
            if self.keep is not None:
                total *= self.keep[..., None]
            x = x if self.weight is None else x * self.weight[..., None]
            total.view(-1, x.shape[-1]).index_add_(0, self.at, x.reshape(-1, x.shape[-1]))
        ones = self.counted
        ones = sums.counts.new_ones(self.at.shape) if ones is None else ones.flatten()
        sums.counts.view(-1).index_add_(0, self.at, ones)

    def pull_back_(self, d_total: Float[Tensor, "M N X"]) -> Float[Tensor, "M L X"]:
        """Gradient of the tokens; makes the gradient of the sums after that of those before."""
        width = d_total.shape[-1]
        d_x = d_total.view(-1, width).index_select(0, self.at).unflatten(0, (len(d_total), -1))
        if self.weight is not None:
            d_x = d_x * self.weight[..., None]
        if self.keep is not None:
            d_total *= self.keep[..., None]
        if self.moved is not None:
            d_total.copy_(d_total.view(-1, width).index_select(0, self.moved).view_as(d_total))
        return d_x


class Call(NamedTuple):
    """What of a call carries no gradient."""

    chunks: list[Chunk]
    rules: Rules
    n_group: int
    """Key-value heads G."""

    def rows(self, flags: Bool[Tensor, "B ..."]) -> Bool[Tensor, "M ..."]:
        """Flags of the batch for each of the M = B G heads."""
        return flags.repeat_interleave(self.n_group, 0)

    def filing(self, chunk: Chunk, place: Tensor, count: Tensor) -> _Filing:
        """How ``chunk`` goes into ``place`` [BG, L] of a dictionary with ``count`` [BG, N]."""
        full = None if chunk.full is None else self.rows(chunk.full)
        n_token = chunk.keys.stop - chunk.keys.start
        return _Filing.of(place, full, count, n_token, self.rules.rate)

    def stretches(self) -> Iterator[range]:
        """Indices of the chunks between two kept dictionaries."""
        n = len(self.chunks)
        step = math.isqrt(n - 1) + 1
        return (range(begin, min(begin + step, n)) for begin in range(0, n, step))


class _Step(NamedTuple):
    """A chunk made anew for the backward pass."""

    chunk: Chunk
    view: _View
    before: Sums
    """The entries in use when it was read."""
    filing: _Filing | None


class _OVQFunction(torch.autograd.Function):
    """(query, key, value, beta, sums of keys, of values, counts, call) -> (out, sums after)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "B H Q K"],
        key: Float[Tensor, "B G P K"],
        value: Float[Tensor, "B G P V"],
        beta: Float[Tensor, " H"],
        key_sum: Float[Tensor, "B G N K"],
        value_sum: Float[Tensor, "B G N V"],
        count: Float[Tensor, "B G N"],
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = Sums(*(x.flatten(0, 1).contiguous() for x in (key_sum, value_sum, count)))
        begins = {stretch[0] for stretch in call.stretches()} if any(ctx.needs_input_grad) else {}
        out = value.new_empty(*query.shape[:3], value.shape[3])
        norm = value.new_empty(query.shape[:3])
        kept: list[Sums] = []
        entries: list[Tensor] = []
        owned = False
        for index, chunk in enumerate(call.chunks):
            if index in begins:
                kept.append(sums.copy(chunk.most_used) if index else sums)
            if chunk.fresh is not None:
                sums, owned = sums.where(~call.rows(chunk.fresh)), True
            view = _View.of(chunk, query, key, value, beta, call)
            out[:, :, chunk.queries], norm[:, :, chunk.queries] = view.look_up(
                sums.first(chunk.most_used)
            )
            if chunk.files:
                sums, owned = sums if owned else sums.copy(sums.counts.shape[1]), True
                entries.append(_places(view, sums, chunk, call))
                call.filing(chunk, entries[-1], sums.counts).apply_(sums, view.key, view.value)
        ctx.call, ctx.n_kept = call, len(kept)
        tensors = [x for state in kept for x in state]
        ctx.save_for_backward(query, key, value, beta, out, norm, *tensors, *entries)
        shapes = (key_sum, value_sum, count)
        after = [x.view_as(y) for x, y in zip(sums, shapes, strict=True)] if owned else shapes
        ctx.mark_non_differentiable(after[2])
        return (out, *after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d[0].device.type, enabled=False):
            return _OVQFunction.gradients(ctx, *d)

    @staticmethod
    def gradients(
        ctx: Any, d_out: Tensor, d_key_sum: Tensor, d_value_sum: Tensor, d_count: Tensor
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        query, key, value, beta, out, norm, *rest = ctx.saved_tensors
        kept = [Sums(*rest[i : i + 3]) for i in range(0, 3 * ctx.n_kept, 3)]
        filed = iter(rest[3 * ctx.n_kept :])
        entries = {i: next(filed) for i, chunk in enumerate(call.chunks) if chunk.files}
        grads = _Gradients(
            torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value),
            torch.zeros_like(beta),
            *(x.flatten(0, 1).clone(memory_format=torch.contiguous_format)
              for x in (d_key_sum, d_value_sum)),
        )  # fmt: skip
        of_output = d_out, -(d_out * out).sum(-1), norm
        for stretch, start in zip(reversed(list(call.stretches())), reversed(kept), strict=True):
            sums, past = start.copy(d_key_sum.shape[2]), []
            for index in stretch:
                chunk = call.chunks[index]
                if chunk.fresh is not None:
                    sums = sums.where(~call.rows(chunk.fresh))
                view = _View.of(chunk, query, key, value, beta, call)
                filing = None
                before = sums.first(chunk.most_used)
                if chunk.files:
                    filing = call.filing(chunk, entries[index], sums.counts)
                    before = Sums(*(x.clone() for x in before))
                    filing.apply_(sums, view.key, view.value)
                past.append(_Step(chunk, view, before, filing))
            while past:
                grads.undo_(past.pop(), of_output, call)
        # Entries that were in no use weigh nothing, and no gradient leaves the call through them.
        place = torch.arange(d_key_sum.shape[2], device=key.device)
        unused = call.rows(place >= call.chunks[0].n_used[:, None])[..., None]
        d_sums = [x.masked_fill(unused, 0) for x in (grads.key_sum, grads.value_sum)]
        d_key_sum, d_value_sum = (
            x.view_as(y) for x, y in zip(d_sums, (d_key_sum, d_value_sum), strict=True)
        )
        return (*grads[:4], d_key_sum, d_value_sum, None, None)


class _View(NamedTuple):
    """What a chunk is read with."""

    read: Read
    query: Float[Tensor, "B H W K"]
    beta: Float[Tensor, " H"]
    lifted: Float[Tensor, "M RW A"]
    """Queries times beta, and, if entries have a bias, beta behind them."""
    key: Float[Tensor, "M L K"]
    value: Float[Tensor, "M L V"]
    allowed: Float[Tensor, "U RW"]
    """1 where a query may see a token of the chunk, 0 else; U: up to the last query's own."""

    @classmethod
    def of(
        cls, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, call: Call
    ) -> _View:
        rule = READS[call.rules.read]
        query = query[:, :, chunk.queries]
        _, n_head, n_query, width = query.shape
        share = n_head // call.n_group
        lifted = query * beta[:, None, None]
        if rule.has_bias:
            more = beta[:, None, None].expand(*query.shape[:3], 1)
            lifted = torch.cat([lifted, more], -1)
        lifted = lifted.reshape(-1, share * n_query, lifted.shape[-1])
        place = torch.arange(chunk.first + n_query, device=query.device)
        allowed = (place[:, None] <= place[chunk.first :]).to(query.dtype).repeat(1, share)
        key, value = (x[:, :, chunk.keys].flatten(0, 1) for x in (key, value))
        return cls(rule, query, beta, lifted, key, value, allowed)

    def to_chunk(self) -> Float[Tensor, "M U RW"]:
        """Weights of the chunk's tokens."""
        width, n_seen = self.key.shape[-1], len(self.allowed)
        scores = self.key[:, :n_seen] @ self.lifted[..., :width].mT
        return scores.exp_().mul_(self.allowed)

    def to_entries(self, centre: Float[Tensor, "M n A"]) -> Float[Tensor, "M n RW"]:
        """Weights of entries, each to be multiplied by its count."""
        return (centre @ self.lifted.mT).exp_()

    def look_up(self, sums: Sums) -> tuple[Float[Tensor, "B H W V"], Float[Tensor, "B H W"]]:
        """What the queries find in the dictionary and the chunk, and their normalisers."""
        weights = self.to_chunk()
        total = weights.mT @ self.value[:, : len(self.allowed)]
        norm = weights.sum(1)
        if sums.counts.shape[1]:
            weights = self.to_entries(self.read.centre(sums.key, sums.counts))
            total.baddbmm_(weights.mT, sums.value)
            norm += torch.bmm(sums.counts[:, None], weights)[:, 0]
        shape = self.query.shape[:3]
        return (total / norm[..., None]).view(*shape, -1), norm.view(shape)


def _places(view: _View, sums: Sums, chunk: Chunk, call: Call) -> Int[Tensor, "M places"]:
    """The entry of each token of a chunk that is filed, and of each old entry if these merge."""
    old = sums.first(chunk.most_used)
    mean = mean_of(old.key, old.counts)
    key, mean = (x.unflatten(0, (-1, call.n_group)) for x in (view.key, mean))
    if call.rules.filing == "merge":
        count = old.counts.unflatten(0, (-1, call.n_group))
        places = merge(key, mean, count, chunk.n_used, chunk.n_new)
        return torch.cat(places, -1).flatten(0, 1)
    entry = assign(key, mean, chunk.n_used, chunk.position, chunk.n_new, call.rules)
    return entry.flatten(0, 1)


class _Gradients(NamedTuple):
    """Gradients as the backward pass has them so far; those of sums belong to one moment."""

    query: Float[Tensor, "B H Q K"]
    key: Float[Tensor, "B G P K"]
    value: Float[Tensor, "B G P V"]
    beta: Float[Tensor, " H"]
    key_sum: Float[Tensor, "M N K"]
    value_sum: Float[Tensor, "M N V"]

    def undo_(self, step: _Step, of_output: tuple[Tensor, Tensor, Tensor], call: Call) -> None:
        """Takes one chunk back: its filing, its reading, its fresh start."""
        chunk, view, before, filing = step
        shape = (-1, call.n_group, *view.key.shape[1:2])
        if filing is not None:
            d_key, d_value = (filing.pull_back_(x) for x in (self.key_sum, self.value_sum))
            self.key[:, :, chunk.keys] = d_key.view(*shape, d_key.shape[-1])
            self.value[:, :, chunk.keys] = d_value.view(*shape, d_value.shape[-1])
        d_out, inner, norm = (x[:, :, chunk.queries] for x in of_output)
        g = (d_out / norm[..., None]).reshape(*view.lifted.shape[:2], -1)
        e = (inner / norm).reshape(*view.lifted.shape[:2], 1)
        d_total = torch.cat([g, e], -1)
        d_lifted = self._of_chunk_(chunk, view, d_total, call)
        if before.counts.shape[1]:
            d_lifted += self._of_entries_(view, before, d_total)
        self._of_queries_(chunk, view, d_lifted)
        if chunk.fresh is not None:
            keep = (~call.rows(chunk.fresh))[:, None, None]
            for x in (self.key_sum, self.value_sum):
                x *= keep

    def _of_chunk_(
        self, chunk: Chunk, view: _View, d_total: Float[Tensor, "M RW Y"], call: Call
    ) -> Float[Tensor, "M RW A"]:
        """Through the chunk's own tokens; returns the gradient of what is ``lifted``."""
        n_seen, width = len(view.allowed), view.key.shape[-1]
        seen = slice(chunk.keys.start, chunk.keys.start + n_seen)
        key, value = view.key[:, :n_seen], view.value[:, :n_seen]
        weights = view.to_chunk()
        with_one = torch.cat([value, value.new_ones(*value.shape[:2], 1)], -1)
        d_scores = torch.bmm(with_one, d_total.mT).mul_(weights)
        for grad, x in (
            (self.value, weights @ d_total[..., :-1]),
            (self.key, d_scores @ view.lifted[..., :width]),
        ):
            grad[:, :, seen] += x.unflatten(0, (-1, call.n_group))
        d_lifted = torch.zeros_like(view.lifted)
        d_lifted[..., :width] = d_scores.mT @ key
        return d_lifted

    def _of_entries_(
        self, view: _View, sums: Sums, d_total: Float[Tensor, "M RW Y"]
    ) -> Float[Tensor, "M RW A"]:
        """Through the dictionary; returns the gradient of what is ``lifted``."""
        n = sums.counts.shape[1]
        with torch.enable_grad():
            key_sum = sums.key.detach().requires_grad_()
            centre = view.read.centre(key_sum, sums.counts)
        weights = view.to_entries(centre.detach())
        with_count = torch.cat([sums.value, sums.counts[..., None]], -1)
        self.value_sum[:, :n].baddbmm_(weights, d_total[..., :-1])
        d_scores = torch.bmm(with_count, d_total.mT).mul_(weights)
        (d_key_sum,) = torch.autograd.grad(centre, key_sum, d_scores @ view.lifted)
        self.key_sum[:, :n] += d_key_sum
        return d_scores.mT @ centre.detach()

    def _of_queries_(self, chunk: Chunk, view: _View, d_lifted: Float[Tensor, "M RW A"]) -> None:
        """From what is ``lifted`` to queries and beta."""
        query, beta = view.query, view.beta
        d_lifted = d_lifted.view(*query.shape[:3], -1)
        d_scaled = d_lifted[..., : query.shape[-1]]
        self.query[:, :, chunk.queries] = beta[:, None, None] * d_scaled
        self.beta.add_((query * d_scaled).sum((0, 2, 3)))
        if view.read.has_bias:
            self.beta.add_(d_lifted[..., -1].sum((0, 2)))


ovq_function = _OVQFunction.apply
"""(query, key, value, beta, sums of keys, of values, counts, call) -> (out, sums after)."""
