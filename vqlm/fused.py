"""Norms and gated products that keep little for their backward pass: what is cheap is made again.

Autograd would keep every step between two matrix products.  Here a norm keeps its input alone, and
a gated product neither silu(gate) nor the product, which are a third of what a layer would keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
"""Added to the mean square of what is normalised."""

ROWS = 512
"""Tokens that a gated product takes at a time."""


def square_length(x: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
    """|x|^2 over the last axis, in the dtype of ``x``; no product of x by x is made on the way, and
    autocast leaves it alone, which it doesn't with ``vecdot``."""
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _inverse_length(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + EPSILON) over the last axis."""
    squares = square_length(x)[..., None]
    return squares.div_(x.shape[-1]).add_(EPSILON).rsqrt_()


def _d_normalised(x: Tensor, inverse: Tensor, d: Tensor) -> Tensor:
    """Gradient to x of x * ``inverse``, given the gradient ``d`` to the product."""
    share = torch.linalg.vecdot(d, x)[..., None].mul_(inverse).mul_(inverse).div_(x.shape[-1])
    return torch.addcmul(d, share, x, value=-1.0).mul_(inverse)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` [...], in float32 if it is of half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        wide = at_least_float32(x)
        return torch.addcmul(bias, wide * _inverse_length(wide), gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        wide, d = at_least_float32(x), at_least_float32(d)
        inverse = _inverse_length(wide)
        d_gain = (wide * inverse).mul_(d).flatten(0, -2).sum(0)
        dx = _d_normalised(wide, inverse, d * gain)
        return dx.to(x.dtype), d_gain, d.flatten(0, -2).sum(0)


def norm(
    x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], bias: Float[Tensor, " D"]
) -> Float[Tensor, "... D"]:
    """gain * x / sqrt(mean(x^2) + EPSILON) + bias, in at least float32; of the dtype of ``x``."""
    return _Norm.apply(x, gain, bias)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return normalised(x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return d_normalised(x, ctx.scale, d), None


def normalise(x: Float[Tensor, "... K"], scale: float) -> Float[Tensor, "... K"]:
    """scale * x / sqrt(mean(x^2) + EPSILON), computed in at least float32."""
    return _Normalise.apply(x, scale)


def normalised(x: Float[Tensor, "... K"], scale: float) -> Float[Tensor, "... K"]:
    """``normalise`` without a backward pass, for functions that write their own."""
    wide = at_least_float32(x)
    return wide * _inverse_length(wide).mul_(scale)


def d_normalised(
    x: Float[Tensor, "... K"], scale: float, d: Float[Tensor, "... K"]
) -> Float[Tensor, "... K"]:
    """Gradient of ``normalised`` to ``x``, given that of its result."""
    wide = at_least_float32(x)
    return _d_normalised(wide, _inverse_length(wide), at_least_float32(d) * scale).to(x.dtype)


class _GatedLinear(torch.autograd.Function):
    """Rows are taken in groups, whose steps between the products stay in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value, weight)
        rows = zip(*(x.flatten(0, -2).split(ROWS) for x in (gate, value)), strict=True)
        parts = [F.linear(F.silu(g) * v, weight) for g, v in rows]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, value, weight = ctx.saved_tensors
        d_gate, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device)
                           for x in (gate, value))  # fmt: skip
        d_weight, wide = torch.zeros_like(weight), weight.to(d.dtype)
        rows = (x.flatten(0, -2).split(ROWS) for x in (d, gate, value, d_gate, d_value))
        for part, g, v, to_gate, to_value in zip(*rows, strict=True):
            silu = F.silu(g)
            d_weight += part.mT @ (silu * v).to(d.dtype)
            d_product = part @ wide
            to_value.copy_(silu.mul_(d_product))
            to_gate.copy_(torch.ops.aten.silu_backward(d_product.mul_(v).to(g.dtype), g))
        return d_gate, d_value, d_weight


def gated_linear(
    gate: Float[Tensor, "... F"], value: Float[Tensor, "... F"], weight: Float[Tensor, "D F"]
) -> Float[Tensor, "... D"]:
    """(silu(gate) * value) W^T: the end of a SwiGLU (Shazeer 2020), and of a gated attention unit
    (Hua et al. 2022), whose values are what attention gave."""
    return _GatedLinear.apply(gate, value, weight)
