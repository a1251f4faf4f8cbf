"""Attention over a dictionary for keys of any size, against its oracle and against softmax."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.dictionary import GROWTH, dictionary_size
from vqlm.patch_attention import DictionaryState, dictionary_attention, empty_state
from vqlm.reference import dictionary_attention_token_by_token, softmax_attention_quadratic

HEADS, GROUPS, D_K, D_V, SCALE = 4, 2, 5, 7, 0.8


def tensors(n_row: int, n_token: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, width: int, size: float) -> Tensor:
        shape = (n_row, heads, n_token, width)
        x = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    # Lengths differ, and scores go to tens: nothing here is bounded.
    return draw(HEADS, D_K, 2.0), draw(GROUPS, D_K, 3.0), draw(GROUPS, D_V, 1.0)


def size_of(growth: str):  # type: ignore[no-untyped-def]
    return lambda t, n: int(dictionary_size(torch.tensor([t]), n, growth))


def run(
    q: Tensor, k: Tensor, v: Tensor, n_entry: int, chunk: int, window: int, growth: str,
    cuts: list[int] | None = None,
) -> tuple[Tensor, DictionaryState]:  # fmt: skip
    state = empty_state(k, v, n_entry, chunk + window)
    outputs = []
    edges = [0, *sorted(set(cuts or [])), q.shape[2]]
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        part = (x[:, :, a:b] for x in (q, k, v))
        out, state = dictionary_attention(*part, state, scale=SCALE, chunk=chunk, growth=growth)
        outputs.append(out)
    return torch.cat(outputs, 2), state


CASES = dict(
    n_token=st.integers(1, 31), n_entry=st.integers(1, 9), chunk=st.sampled_from([1, 3, 4]),
    n_window=st.integers(0, 2), growth=st.sampled_from(sorted(GROWTH)), seed=st.integers(0, 99),
)  # fmt: skip


@given(**CASES)
def test_it_is_the_oracle_in_outputs_and_gradients(
    n_token: int, n_entry: int, chunk: int, n_window: int, growth: str, seed: int
) -> None:
    q, k, v = tensors(1, n_token, seed)
    got, _ = run(q, k, v, n_entry, chunk, n_window * chunk, growth)
    want = dictionary_attention_token_by_token(
        q[0], k[0], v[0], SCALE, n_entry, chunk, n_window * chunk, size_of(growth)
    )[None]
    dy = torch.randn_like(want)
    of_got = torch.autograd.grad(got, (q, k, v), dy)
    of_want = torch.autograd.grad(want, (q, k, v), dy)
    assert_close((got, *of_got), (want, *of_want))


@given(**CASES, cuts=st.lists(st.integers(1, 30), max_size=4))
def test_cuts_of_the_stream_change_nothing(
    n_token: int, n_entry: int, chunk: int, n_window: int, growth: str, seed: int, cuts: list[int]
) -> None:
    q, k, v = (x.detach() for x in tensors(2, n_token, seed))
    whole, state = run(q, k, v, n_entry, chunk, n_window * chunk, growth)
    cuts = [c for c in cuts if c < n_token]
    parts, after = run(q, k, v, n_entry, chunk, n_window * chunk, growth, cuts)
    assert_close(parts, whole)
    for a, b in zip(state[:3] + state[5:], after[:3] + after[5:], strict=True):
        assert_close(a, b)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=3), seed=st.integers(0, 99),
    chunk=st.sampled_from([1, 3, 4]), n_window=st.integers(0, 1),
)  # fmt: skip
def test_rows_out_of_step_are_as_each_alone(
    lengths: list[int], seed: int, chunk: int, n_window: int
) -> None:
    """Row 0 stops at lengths[i] in call i, row 1 reads all; both as if alone."""
    n_each = 12
    q, k, v = (x.detach() for x in tensors(2, n_each * len(lengths), seed))
    state = empty_state(k, v, 4, chunk * (1 + n_window))
    kept: list[Tensor] = []
    own = []
    for i, n in enumerate(lengths):
        at = slice(i * n_each, (i + 1) * n_each)
        real = torch.tensor([n, n_each])
        part = (x[:, :, at] for x in (q, k, v))
        out, state = dictionary_attention(*part, state, real, scale=SCALE, chunk=chunk)
        assert not out[0, :, n:].any()
        kept.append(out[0, :, :n])
        own += list(range(i * n_each, i * n_each + n))
    alone, _ = run(*(x[:1, :, own] for x in (q, k, v)), 4, chunk, chunk * n_window, "eager")
    assert_close(torch.cat(kept, 1), alone[0])
    assert state.length.tolist() == [sum(lengths), n_each * len(lengths)]


def softmax(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    none = torch.zeros(HEADS, D_K, dtype=torch.float64)
    rows = torch.zeros(HEADS, (window or 0) + 1, D_K, dtype=torch.float64)
    documents = torch.zeros(q.shape[0], q.shape[2])
    bias = (none, none, rows)
    return softmax_attention_quadratic(SCALE * q, k, v, bias, documents, window is not None)


def test_with_an_entry_for_every_token_it_is_softmax_attention() -> None:
    q, k, v = tensors(2, 41, 0)
    want = softmax(q, k, v)
    for n_entry, window in ((41, 0), (50, 8), (33, 8)):
        assert_close(run(q, k, v, n_entry, 8, window, "eager")[0], want)
    assert not torch.allclose(run(q, k, v, 31, 8, 0, "eager")[0], want)
    codes = k.detach()[0]  # a codebook that holds every key
    state = empty_state(k[:1], v[:1], 41, 8)
    got, _ = dictionary_attention(q[:1], k[:1], v[:1], state, scale=SCALE, chunk=8, codes=codes)
    assert_close(got, want[:1])


def test_without_a_dictionary_it_is_a_sliding_window() -> None:
    q, k, v = tensors(2, 41, 1)
    for window in (0, 5, 8, 11):
        state = empty_state(k, v, 0, 8 * (1 + -(-window // 8)))
        got, _ = dictionary_attention(q, k, v, state, scale=SCALE, chunk=8, reach=window)
        assert_close(got, softmax(q, k, v, window))


def test_codes_stand_for_the_keys_that_are_nearest() -> None:
    q, k, v = tensors(1, 20, 2)
    codes = torch.randn(GROUPS, 3, D_K, dtype=torch.float64) * 3
    state = empty_state(k, v, 3, 4)
    got, after = dictionary_attention(q, k, v, state, scale=SCALE, chunk=4, codes=codes)
    t, h = 19, 3  # a query of the last chunk: 16 tokens are filed, 4 recent
    near = torch.cdist(k[0, 1, :16], codes[1]).argmin(1)
    assert after.key_count[0, 1].tolist() == near.bincount(minlength=3).tolist()
    keys = torch.cat([codes[1][near], k[0, 1, 16:]])
    want = (SCALE * q[0, h, t] @ keys.mT).softmax(-1) @ v[0, 1]
    assert_close(got[0, h, t], want)


def test_a_state_is_kept_as_it_was() -> None:
    q, k, v = (x.detach() for x in tensors(2, 9, 3))
    _, state = run(q, k, v, 4, 4, 4, "eager")
    before = [x.clone() for x in state]
    dictionary_attention(q, k, v, state, scale=SCALE, chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
