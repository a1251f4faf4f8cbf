"""A sequence cut over processes: each has a part, and what it must know of those before it.

That is a state of constant size, so what is sent does not grow with the length of the parts.  Of a
state there are three kinds of fields, and for each a way that gives what the uncut sequence has,
in both passes:

* the newest tokens (windows, short convolutions): those of the part before, ``newest_before``;
* sums (the slots of VQ-attention): a scan over the parts, ``sums_before``, in ceil(log2 P) rounds,
  since adding and starting anew at documents is associative;
* what depends on the state before in other ways (the dictionary of OVQ-attention): part after part,
  ``take`` and ``hand_on``.  While a part is in one layer the next is in the layer before, so P
  parts of N layers take the time of N + P - 1 layers, not of P N.

Every process must make the same calls in the same order.  Backward passes send gradients the same
ways in reverse.  Axes: B rows; P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqlm.config import LMConfig


class Cut:
    """This process's part of sequences that are cut over the processes of ``group``, in order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.part, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        """Bytes that this process has sent so far."""

    @property
    def is_first(self) -> bool:
        """Whether nothing of the sequence comes before this part."""
        return self.part == 0

    def newest_before(self, x: Tensor, memory: Tensor, dim: int) -> Tensor:
        """The newest entries of ``x`` [...] along ``dim`` that the part before has, as many as
        ``memory``, which is what the first part finds."""
        n_slot, dtype = memory.shape[dim], memory.dtype
        own = x.narrow(dim, x.shape[dim] - n_slot, n_slot).to(dtype)
        found: Tensor = _Shift.apply(self, own)
        # The first part found zeros; its graph is that of the others, so that all exchange
        # gradients.
        return found + memory if self.is_first else found

    def sums_before(self, x: Tensor, goes_on: Bool[Tensor, " B"]) -> Tensor:
        """s_p = x_(p-1) + s_(p-1) [B, ...] where row b of part p - 1 ``goes_on``, else x_(p-1);
        s_0 = 0."""
        if not x.is_floating_point():
            return self.scan(x, goes_on, 1)
        found: Tensor = _Scan.apply(self, x, goes_on)
        return found

    def take(self, state: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """The state that the part before has handed on; in the first part ``state``.

        ``like`` [...]: any tensor with a gradient, so that there is one here as well.
        """
        return list(_Take.apply(self, like, *state))

    def hand_on(self, y: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Gives ``state`` to the next part; returns ``y`` [...], with whose gradient that of the
        state comes back."""
        handed: Tensor = _HandOn.apply(self, y, *state)
        return handed

    def of_last(self, state: Sequence[Tensor]) -> list[Tensor]:
        """The last part's ``state``, in all of them; without gradient."""
        source = dist.get_global_rank(self.group, self.count - 1)
        found = []
        for x in state:
            x = x.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(x, source, group=self.group)
            self._count([x], self.part == self.count - 1)
            found.append(x)
        return found

    def exchange(self, x: Tensor, step: int) -> Tensor:
        """``x`` [...] of the part ``step`` before this one; zeros where there is none."""
        x, found = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
        operations = []
        if 0 <= self.part + step < self.count:
            operations.append(self._operation(dist.isend, x, step))
            self._count([x])
        if 0 <= self.part - step < self.count:
            operations.append(self._operation(dist.irecv, found, -step))
        self._wait(operations)
        return found

    def scan(self, x: Tensor, goes_on: Bool[Tensor, " B"], direction: int) -> Tensor:
        """``sums_before`` [B, ...] (direction 1), or the same from last part to first (-1)."""
        total = self.exchange(x, direction)
        factor = goes_on.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        keeps = self.exchange(factor, direction)
        step = 1
        while step < self.count - 1:
            # The sum of 2 step parts is that of the nearer step parts and of those beyond.
            total = total + keeps * self.exchange(total, direction * step)
            keeps = keeps * self.exchange(keeps, direction * step)
            step *= 2
        return total

    def send(self, tensors: Sequence[Tensor], step: int) -> None:
        """Sends tensors to the part ``step`` behind this one."""
        tensors = [x.contiguous() for x in tensors]
        self._count(tensors)
        self._wait([self._operation(dist.isend, x, step) for x in tensors])

    def receive(self, like: Sequence[Tensor], step: int) -> list[Tensor]:
        """Tensors from the part ``step`` behind this one."""
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
        self._wait([self._operation(dist.irecv, x, step) for x in found])
        return found

    def _operation(self, kind: Any, x: Tensor, step: int) -> dist.P2POp:
        peer = dist.get_global_rank(self.group, self.part + step)
        return dist.P2POp(kind, x, peer, self.group)

    def _wait(self, operations: list[dist.P2POp]) -> None:
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    def _count(self, tensors: Sequence[Tensor], sends: bool = True) -> None:
        self.sent += sends * sum(x.numel() * x.element_size() for x in tensors)


def require_cuttable(config: LMConfig, n_token: int, unpadded: bool = True) -> None:
    """Nothing, if parts of ``n_token`` tokens add up to the uncut sequence.

    Raises:
        ValueError: they don't; the message says what would.
    """
    mixers = set(config.mixers)
    if "softmax" in mixers:
        raise ValueError(
            "a softmax mixer remembers every token, so its sequences cannot be cut over processes; "
            "train with sequence_parallel=1, or with vq, ovq and window mixers"
        )
    if alone := mixers & {"gated-deltanet", "mamba2"}:
        raise ValueError(
            f"sequences of a {min(alone)} mixer cannot be cut over processes; train with "
            "sequence_parallel=1, or with vq, ovq and window mixers"
        )
    if not unpadded:
        raise ValueError("parts of a sequence that is cut over processes cannot be padded")
    reach = max(config.conv_width - 1, config.window if mixers & {"vq", "window"} else 0)
    if n_token < reach:
        raise ValueError(
            f"parts of {n_token} tokens are shorter than the window of {reach}; want a seq_len of "
            f"at least {reach} tokens for each process that a sequence is cut over"
        )
    if "vq" in mixers and n_token % config.block:
        raise ValueError(
            f"parts of {n_token} tokens are no multiple of block={config.block}, so that keys "
            "would get other gradients than in the uncut sequence; choose another block or seq_len"
        )


class _Shift(torch.autograd.Function):
    """The part before's tensor."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, x: Tensor) -> Tensor:
        ctx.cut = cut
        return cut.exchange(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor]:
        return None, ctx.cut.exchange(d, -1)


class _Scan(torch.autograd.Function):
    """``Cut.sums_before``; what part p gets gradient from is the scan in reverse."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, x: Tensor, goes_on: Tensor) -> Tensor:
        ctx.cut = cut
        ctx.save_for_backward(goes_on)
        return cut.scan(x, goes_on, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor, None]:
        (goes_on,) = ctx.saved_tensors
        return None, ctx.cut.scan(d, goes_on, -1), None


def _floats(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point()]


class _Take(torch.autograd.Function):
    """``Cut.take``."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, like: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.cut, ctx.kinds = cut, [x.is_floating_point() for x in state]
        found = [x.view_as(x) for x in state] if cut.is_first else cut.receive(state, -1)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_state: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.cut.is_first:
            own = (d if kind else None for d, kind in zip(d_state, ctx.kinds, strict=True))
            return None, None, *own
        ctx.cut.send([d for d, kind in zip(d_state, ctx.kinds, strict=True) if kind], -1)
        return None, None, *([None] * len(d_state))


class _HandOn(torch.autograd.Function):
    """``Cut.hand_on``.  Gradients are waited for when that of ``y`` is there, layer by layer, so
    that no process waits for one that waits for it."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, y: Tensor, *state: Tensor) -> Tensor:
        ctx.cut, ctx.is_last = cut, cut.part == cut.count - 1
        ctx.save_for_backward(*state)
        if not ctx.is_last:
            cut.send(state, 1)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        state = ctx.saved_tensors
        if ctx.is_last:
            return None, d_y, *([None] * len(state))
        found = iter(ctx.cut.receive(_floats(state), 1))
        return None, d_y, *(next(found) if x.is_floating_point() else None for x in state)
