"""Cross-entropy of the next token, without the logits of all tokens at once.

The logits of T tokens over V pieces are T V numbers, which autograd would keep three times over.
Here a chunk's logits become its loss and, on the spot, the gradient of that to its hidden vectors
and to the output weights.  What is left for the backward pass is one factor.

Axes: n tokens, D model, V pieces of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqlm.fused import at_least_float32

IGNORED = -100
"""A target that does not count, as in ``torch.nn.functional.cross_entropy``."""

CHUNK_NUMBERS = 1 << 21
"""Logits that are made at a time."""


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
    ) -> Tensor:
        kind, wanted = hidden.device.type, ctx.needs_input_grad
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            x, w = hidden.to(dtype), weight.to(dtype)
            d_hidden = torch.empty_like(x) if wanted[0] else None
            d_weight = torch.zeros_like(weight) if wanted[1] else None
            d_bias = torch.zeros_like(bias) if wanted[2] else None
            nats = at_least_float32(hidden.new_zeros(()))
            size = max(1, CHUNK_NUMBERS // len(weight))
            for begin in range(0, len(targets), size):
                cut = slice(begin, begin + size)
                d_logits, some = _chunk(F.linear(x[cut], w, bias.to(dtype)), targets[cut], scale)
                nats = nats + some
                d_logits = d_logits.to(dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, w, out=d_hidden[cut])
                if d_weight is not None:
                    d_weight += d_logits.mT @ x[cut]
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * d for x in ctx.saved_tensors), None, None


def _chunk(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradient to ``logits`` before they are scaled, and the sum of the cross-entropies."""
    logits = at_least_float32(logits).mul_(scale)
    counted = (targets != IGNORED)[:, None]
    target = targets[:, None].where(counted, 0)
    total = logits.logsumexp(-1, keepdim=True)
    nats = (total - logits.gather(1, target)).mul_(counted).sum()
    d = logits.sub_(total).exp_()
    d.scatter_add_(1, target, d.new_full((), -1.0).expand(target.shape))
    return d.mul_(scale).mul_(counted), nats


def summed_cross_entropy(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"],
    targets: Int[Tensor, " n"],
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """Sum over ``targets`` that are not ``IGNORED`` of -log softmax(scale (W h + b))[target], in at
    least float32; 0 if there are none.

    Under autocast, products of matrices are in its format.  It can be differentiated once.
    On a CPU, logits are made of the counted tokens alone; elsewhere it would take waiting for the
    device to know how many they are.
    """
    if targets.device.type == "cpu":
        counted = targets != IGNORED
        if not bool(counted.all()):
            hidden, targets = hidden[counted], targets[counted]
    return _SummedCrossEntropy.apply(hidden, weight, bias, targets, scale)
