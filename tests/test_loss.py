"""Cross-entropy in chunks: values and gradients against torch's over all logits, and its memory."""

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import vqlm.loss
from vqlm.loss import IGNORED, summed_cross_entropy
from vqlm.model import LM


def case(n: int, width: int, pieces: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Hidden vectors, weights and biases; targets, about a third of which don't count."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, width), (pieces, width), (pieces,)]
    inputs = [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]
    targets = torch.randint(pieces, (n,), generator=generator)
    ignored = torch.rand(n, generator=generator) < 0.3
    return inputs, targets.masked_fill(ignored, IGNORED)


def whole(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float) -> Tensor:
    logits = scale * F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


@given(
    n=st.integers(1, 13), width=st.integers(1, 7), pieces=st.integers(1, 11),
    chunk=st.integers(1, 60), scale=st.sampled_from([1.0, 0.005, 3.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_chunks_give_what_all_logits_give(
    n: int, width: int, pieces: int, chunk: int, scale: float, seed: int
) -> None:
    inputs, targets = case(n, width, pieces, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqlm.loss, "CHUNK_NUMBERS", chunk)
        got = summed_cross_entropy(*inputs, targets, scale)
        mine = torch.autograd.grad(0.7 * got, inputs)
    want = whole(*inputs, targets, scale)
    assert_close(got, want, atol=1e-12, rtol=1e-12)
    for a, b in zip(mine, torch.autograd.grad(0.7 * want, inputs), strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_only_wanted_gradients_are_made() -> None:
    (hidden, weight, bias), targets = case(5, 3, 7)
    loss = summed_cross_entropy(hidden.detach(), weight, bias.detach(), targets)
    loss.backward()
    assert hidden.grad is None and bias.grad is None and weight.grad is not None
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(hidden, weight, bias, targets), loss)


@pytest.mark.parametrize("n_counted", [0, 1, 7, 20])
def test_logits_are_made_of_counted_tokens_alone(
    n_counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _ = case(20, 3, 7)
    targets = torch.arange(20).remainder(7)
    targets[torch.randperm(20)[n_counted:]] = IGNORED
    rows, chunk = [], vqlm.loss._chunk

    def counting(logits: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(logits))
        return chunk(logits, *more)

    monkeypatch.setattr(vqlm.loss, "_chunk", counting)
    loss = summed_cross_entropy(*inputs, targets)
    mine, want = (torch.autograd.grad(x, inputs) for x in (loss, whole(*inputs, targets, 1.0)))
    assert sum(rows) == n_counted
    for a, b in zip(mine, want, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_half_precision_is_as_near_as_autograd_gets() -> None:
    wide, targets = case(64, 32, 50)
    half = [x.detach().float().requires_grad_() for x in wide]
    want = torch.autograd.grad(whole(*wide, targets, 1.0), wide)
    results = []
    for function in (summed_cross_entropy, whole):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*half, targets, 1.0)
        results.append(torch.autograd.grad(loss, half))
    for mine, autograds, exact in zip(*results, want, strict=True):
        assert mine.dtype == torch.float32
        error, allowed = ((x - exact).norm() / exact.norm() for x in (mine, autograds))
        assert error <= 2 * allowed


@pytest.mark.parametrize("tie", [False, True])
def test_a_models_nats_are_those_of_its_logits(tie: bool) -> None:
    """Padding in any pattern counts for nothing."""
    torch.manual_seed(0)
    sizes = {**vars(tiny.MODEL), "tie_embedding": tie, "output_scale": 0.5, "mixers": ("vq",)}
    lm = LM(type(tiny.MODEL)(**sizes)).double()
    tokens, targets = torch.randint(256, (2, 3, 13))
    mask = torch.rand(3, 13) < 0.7
    targets[0, 3] = IGNORED
    out = lm(tokens, mask=mask, targets=targets)
    loss, nats = out.objective(0.1, 39)
    counted = mask & (targets != IGNORED)
    full = lm(tokens, mask=mask)
    want = full.objective(targets.where(counted, 0), 0.1, counted)
    assert_close(loss, want.loss)
    assert_close(nats, want.nats)
    mine = torch.autograd.grad(loss, list(lm.parameters()))
    pairs = zip(mine, torch.autograd.grad(want.loss, list(lm.parameters())), strict=True)
    for a, b in pairs:
        assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_nothing_of_the_size_of_all_logits_is_kept() -> None:
    (hidden, weight, bias), targets = case(400, 4, 500)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        summed_cross_entropy(hidden, weight, bias, targets)
    assert sum(x.numel() for x in kept) <= hidden.numel() + weight.numel() + bias.numel()
