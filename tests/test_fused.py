"""Norms and gated products: values and gradients against autograd's, and what they keep."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import vqlm.fused
from vqlm.fused import d_normalised, gated_linear, norm, normalise, normalised

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def plainly_normalised(x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "norm": (norm, lambda x, g, b: g * plainly_normalised(x) + b, [(2, 5, 7), (7,), (7,)]),
    "normalise": (
        lambda x: normalise(x, 0.3), lambda x: plainly_normalised(x, 0.3), [(2, 3, 5, 7)],
    ),
    "gated_linear": (
        gated_linear, lambda g, v, w: F.linear(F.silu(g) * v, w), [(2, 5, 7), (2, 5, 7), (3, 7)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_autograds(name: str, size: float) -> None:
    """Small numbers too, where the epsilon inside the root counts."""
    ours, plain, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [(size * torch.randn(s)).double().requires_grad_() for s in shapes]
    got, want = ours(*inputs), plain(*inputs)
    assert_close(got, want, **EXACT)
    d = torch.randn_like(want)
    pairs = zip(
        torch.autograd.grad(got, inputs, d), torch.autograd.grad(want, inputs, d), strict=True
    )
    for a, b in pairs:
        assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(2, 5, 7), (2, 5, 7), (3, 7)]
    inputs = [torch.randn(s).double().requires_grad_() for s in shapes]
    sides = []
    for rows in (512, 4):
        monkeypatch.setattr(vqlm.fused, "ROWS", rows)
        y = gated_linear(*inputs)
        sides.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for whole, grouped in zip(*sides, strict=True):
        assert_close(grouped, whole, **EXACT)


def test_the_plain_functions_are_what_normalise_does() -> None:
    x = torch.randn(3, 5, 7).double().requires_grad_()
    d = torch.randn_like(x)
    y = normalise(x, 0.3)
    assert torch.equal(y, normalised(x, 0.3))
    (want,) = torch.autograd.grad(y, x, d)
    assert torch.equal(d_normalised(x.detach(), 0.3, d), want)


@pytest.mark.parametrize(("name", "n_kept"), [("norm", 1), ("normalise", 1), ("gated_linear", 2)])
def test_only_what_came_in_is_kept(name: str, n_kept: int) -> None:
    """And parameters, which are there anyway."""
    ours, _, shapes = CASES[name]
    inputs = [torch.randn(s).requires_grad_() for s in shapes]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        ours(*inputs)
    assert set(kept) <= {x.data_ptr() for x in inputs}
    assert len(kept) <= n_kept + 1


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_as_near_as_autograd_gets(name: str) -> None:
    ours, plain, shapes = CASES[name]
    torch.manual_seed(0)
    wide = [torch.randn(s).double().requires_grad_() for s in shapes]
    half = [x.detach().float().requires_grad_() for x in wide]
    want = torch.autograd.grad(plain(*wide).square().sum(), wide)
    results = []
    for function in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*half)
        results.append(torch.autograd.grad(y.float().square().sum(), half))
    for mine, autograds, exact in zip(*results, want, strict=True):
        assert mine.dtype == torch.float32
        error, allowed = ((x - exact).norm() / exact.norm() for x in (mine, autograds))
        assert error <= 2 * allowed + 1e-6
