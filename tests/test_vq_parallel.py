"""All blocks at once against one after another, and against the quadratic oracle."""

import dataclasses

import pytest
import torch
from attention_case import BATCH
from hypothesis import given
from hypothesis import strategies as st
from test_vq import EXACT, Case, K, S, V, cases, quantize, run_oracle
from torch import Tensor
from torch.testing import assert_close

from vqlm.layers import RelativeBias
from vqlm.segments import Segments
from vqlm.vq import VQState, initial_state, vq_attention
from vqlm.vq_parallel import REDUCTIONS, vq_attention_parallel

Result = tuple[list[Tensor], VQState, list[Tensor]]


def run(
    case: Case,
    lengths: tuple[int, ...] | None,
    reduction: str | None,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """Outputs of every call, last state, gradients; ``reduction`` None: the serial loop.

    ``lengths`` are real tokens of the rows in each call.  The state before the first call is not
    empty and has a gradient too; the loss reads outputs at real tokens and the last state.
    """
    x = {name: y.detach().to(dtype).requires_grad_() for name, y in case.tensors().items()}
    book = case.codebook().to(dtype)
    keys, codes = quantize(case, book, x["k"])
    state, given_state = earlier_state(case, dtype)
    bias = RelativeBias(x["u"], x["w"], x["rows"])
    settings = {"block": case.block, "cache_grad": case.cache_grad}
    outputs, loss = [], torch.zeros((), dtype=dtype)
    bounds = [*case.call_starts(), case.n_token]
    torch.manual_seed(case.seed + 2)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut, mask = slice(begin, end), None
        if lengths is not None:
            mask = torch.arange(end - begin) < torch.tensor(lengths)[:, None]
        segments = Segments.of(mask, case.starts()[:, cut] if case.document_starts else None)
        part = keys._replace(code=keys.code[:, :, cut], key=keys.key[:, :, cut])
        arguments = (x["q"][:, :, cut], part, x["v"][:, :, cut], codes, bias, state, segments)
        if reduction is None:
            y, state = vq_attention(*arguments, **settings)
        else:
            y, state = vq_attention_parallel(*arguments, **settings, reduction=reduction)
        assert torch.isfinite(y).all()
        outputs.append(y if mask is None else y * mask[:, None, :, None])
        loss = loss + (torch.randn(y.shape, dtype=dtype) * outputs[-1]).sum()
    for field in (state.key, state.value, state.value_sum):
        loss = loss + (torch.randn(field.shape, dtype=dtype) * field).sum()
    leaves = [*x.values(), *given_state]
    return outputs, state, list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def earlier_state(case: Case, dtype: torch.dtype) -> tuple[VQState, list[Tensor]]:
    """A state that has seen 1 and 12 tokens of a document, and its parts with gradients."""
    other = dataclasses.replace(case, n_token=12, seed=case.seed + 7)
    x = other.tensors()
    keys, codes = quantize(case, case.codebook(), x["k"])
    with torch.no_grad():
        bias = RelativeBias(x["u"], x["w"], x["rows"])
        segments = Segments.of(torch.arange(12) < torch.tensor([[1], [12]]))
        empty = initial_state(case.config, BATCH, x["q"])
        _, state = vq_attention(
            x["q"], keys, x["v"], codes, bias, empty, segments, block=case.block
        )
    leaves = [y.to(dtype).requires_grad_() for y in (state.key, state.value, state.value_sum)]
    count = state.value_count.to(dtype)
    # What a slot without keys holds is nobody's.
    value_sum = leaves[2] * (count > 0)[..., None]
    state = state._replace(key=leaves[0], value=leaves[1], value_sum=value_sum, value_count=count)
    return state, leaves


@given(
    cases(),
    st.none() | st.tuples(st.integers(0, 23), st.integers(0, 23)),
    st.sampled_from(REDUCTIONS),
)
def test_equals_the_serial_loop(
    case: Case, lengths: tuple[int, ...] | None, reduction: str
) -> None:
    """Outputs, the whole state and all gradients; documents, padding, cuts, an earlier state."""
    if lengths is not None:
        lengths = tuple(min(n, case.n_token) for n in lengths)
    assert_close(run(case, lengths, reduction), run(case, lengths, None), **EXACT)


@given(cases(), st.sampled_from(REDUCTIONS))
def test_equals_quadratic_oracle_with_gradients(case: Case, reduction: str) -> None:
    """Straight from the empty state to the dense definition, gradients included."""
    sides = []
    for run_side in (run_parallel, run_oracle):
        x = case.tensors()
        y = run_side(case, x, reduction) if run_side is run_parallel else run_oracle(case, x)
        torch.manual_seed(case.seed + 2)
        sides.append((y, *torch.autograd.grad(
            y, list(x.values()), torch.randn(y.shape, dtype=y.dtype), materialize_grads=True
        )))  # fmt: skip
    assert_close(*sides, **EXACT)


def run_parallel(case: Case, x: dict[str, Tensor], reduction: str) -> Tensor:
    keys, codes = quantize(case, case.codebook(), x["k"])
    state = initial_state(case.config, BATCH, x["q"])
    bounds, outputs = [*case.call_starts(), case.n_token], []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut = slice(begin, end)
        y, state = vq_attention_parallel(
            x["q"][:, :, cut], keys._replace(code=keys.code[:, :, cut], key=keys.key[:, :, cut]),
            x["v"][:, :, cut], codes, RelativeBias(x["u"], x["w"], x["rows"]), state,
            Segments.of(starts=case.starts()[:, cut]), block=case.block,
            cache_grad=case.cache_grad, reduction=reduction,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("heads", ["single", "grouped"])
@pytest.mark.parametrize("cache_grad", [True, False])
@pytest.mark.parametrize(
    ("n_token", "window", "block", "documents", "lengths"),
    [
        (23, 3, 2, (), None),  # twelve blocks, an odd number of tokens
        (23, 3, 2, (6, 13), None),
        (23, 5, 3, (7, 8), (4, 22)),  # one row ends early, one in its last block
        (20, 2, 4, (1, 5, 19), (0, 20)),  # one row has nothing at all
        (21, 9, 2, (4,), (21, 5)),  # a window of many blocks
        (16, 4, 16, (3,), None),  # a single block
    ],
)
def test_what_must_not_be_left_to_chance(
    reduction: str,
    heads: str,
    cache_grad: bool,
    n_token: int,
    window: int,
    block: int,
    documents: tuple[int, ...],
    lengths: tuple[int, ...] | None,
) -> None:
    case = Case(heads, window, block, n_token, True, cache_grad, documents, (), 0)
    assert_close(run(case, lengths, reduction), run(case, lengths, None), **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sums_and_counts_stay_wide_under_autocast(reduction: str) -> None:
    """bfloat16 could neither count to 257 nor keep a sum of many values."""
    case = Case("grouped", 3, 2, 23, True, True, (), (), 1)
    x = {name: y.detach().float() for name, y in case.tensors().items()}
    book = case.codebook().float()
    keys, codes = quantize(case, book, x["k"])
    state = initial_state(case.config, BATCH, x["q"])
    state = state._replace(value_count=state.value_count + 1000, length=state.length + 1000 * S + 3)
    arguments = (x["q"], keys, x["v"], codes, RelativeBias(x["u"], x["w"], x["rows"]), state)
    with torch.autocast("cpu", torch.bfloat16):
        _, want = vq_attention(*arguments, block=2)
        _, got = vq_attention_parallel(*arguments, block=2, reduction=reduction)
    assert got.value_sum.dtype == torch.float32
    assert torch.equal(got.value_count, want.value_count)
    assert_close(got.value_sum, want.value_sum)


def test_the_result_keeps_no_state_of_other_blocks_alive() -> None:
    """What is returned is as large as one state, not as the states of all blocks."""
    case = Case("multi-head", 3, 2, 22, True, True, (), (), 1)
    x = {name: y.detach() for name, y in case.tensors().items()}
    keys, codes = quantize(case, case.codebook(), x["k"])
    state = initial_state(case.config, BATCH, x["q"])
    bias = RelativeBias(x["u"], x["w"], x["rows"])
    _, state = vq_attention_parallel(x["q"], keys, x["v"], codes, bias, state, block=2)
    for field in state:
        assert field.untyped_storage().nbytes() == field.numel() * field.element_size()
    assert state.value_sum.shape == (BATCH, 3, S, V) and state.key.shape == (BATCH, 3, 3, K)


def test_hostile_arguments_are_refused() -> None:
    case = Case("single", 4, 2, 5, True, True, (), (), 0)
    x = case.tensors()
    keys, codes = quantize(case, case.codebook(), x["k"])
    bias = RelativeBias(x["u"], x["w"], x["rows"])
    state = initial_state(case.config, BATCH, x["q"])
    arguments = (x["q"], keys, x["v"], codes, bias)
    with pytest.raises(ValueError, match="reduction 'matmult'; did you mean 'matmul'"):
        vq_attention_parallel(*arguments, state, block=2, reduction="matmult")
    other = initial_state(dataclasses.replace(case.config, window=6), BATCH, x["q"])
    with pytest.raises(ValueError, match="window of 6 wants 7"):
        vq_attention_parallel(*arguments, other, block=2)
