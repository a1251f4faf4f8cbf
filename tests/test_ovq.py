"""OVQ-attention against its token-by-token oracle, and what the mathematics promises."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_case import BATCH, HEADS, AttentionCase
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import GROWTHS, LMConfig
from vqlm.ovq import (
    GROWTH,
    OVQAttention,
    OVQState,
    dictionary_size,
    initial_state,
    ovq_attention,
)
from vqlm.reference import ovq_attention_token_by_token
from vqlm.segments import Segments

K, V = 5, 7
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@dataclasses.dataclass(frozen=True)
class Case(AttentionCase):
    heads: str
    n_entry: int
    chunk: int
    n_token: int
    growth: str
    renormalised: bool
    cuts: tuple[int, ...]
    document_starts: tuple[int, ...]
    seed: int

    @property
    def config(self) -> LMConfig:
        n_head, groups = HEADS[self.heads]
        return LMConfig(
            d_model=6, n_head=n_head, n_kv_head=groups, d_k=K, d_v=V, n_entry=self.n_entry,
            chunk=self.chunk, growth=self.growth, mixers=("ovq",),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        torch.manual_seed(self.seed)
        n_head, groups = HEADS[self.heads]
        q, k = (
            torch.randn(BATCH, n_head, self.n_token, K),
            torch.randn(BATCH, groups, self.n_token, K),
        )
        v, beta = torch.randn(BATCH, groups, self.n_token, V), torch.rand(n_head) * 9 + 0.5
        made = dict(q=F.normalize(q.double(), dim=-1), k=F.normalize(k.double(), dim=-1))
        made |= dict(v=v.double(), beta=beta.double())
        return {name: x.requires_grad_() for name, x in made.items()}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    times = st.lists(st.integers(0, 28), max_size=3).map(tuple)
    return Case(
        draw(st.sampled_from(list(HEADS))), draw(st.integers(1, 33)), draw(st.integers(1, 9)),
        draw(st.integers(1, 29)), draw(st.sampled_from(GROWTHS)), draw(st.booleans()), draw(times),
        draw(times), draw(st.integers(0, 999)),
    )  # fmt: skip


def run_fast(case: Case, x: dict[str, Tensor]) -> Tensor:
    state = initial_state(case.config, BATCH, x["q"])
    bounds = [0, *sorted({c for c in case.cuts if 0 < c < case.n_token}), case.n_token]
    outputs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut = slice(begin, end)
        y, state = ovq_attention(
            x["q"][:, :, cut], x["k"][:, :, cut], x["v"][:, :, cut], x["beta"], state,
            Segments.of(starts=case.starts()[:, cut]), growth=case.growth,
            renormalised=case.renormalised,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs, 2)


def run_oracle(case: Case, x: dict[str, Tensor]) -> Tensor:
    def size(n_token: int, n_entry: int) -> int:
        return int(dictionary_size(torch.tensor([n_token]), n_entry, case.growth))

    rows = []
    for b in range(BATCH):
        begins = case.starts()[b].nonzero()[:, 0].tolist()
        bounds = [0, *(t for t in begins if t > 0), case.n_token]
        parts = [
            ovq_attention_token_by_token(
                *(x[name][b : b + 1, :, lo:hi] for name in "qkv"), x["beta"], case.n_entry,
                case.chunk, size, case.renormalised,
            )
            for lo, hi in zip(bounds, bounds[1:], strict=False)
        ]  # fmt: skip
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def output_and_gradients(run: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    x = case.tensors()
    y = run(case, x)
    torch.manual_seed(case.seed + 2)
    grads = torch.autograd.grad(y, list(x.values()), torch.randn_like(y))
    return (y, *grads)


@given(cases())
def test_outputs_and_gradients_equal_the_oracle(case: Case) -> None:
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("n_entry", [1, 4, 50])
def test_grid_of_cases(heads: str, growth: str, n_entry: int) -> None:
    case = Case(heads, n_entry, 4, 27, growth, True, (5, 6, 19), (9,), 3)
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


def test_with_an_entry_for_every_token_it_is_softmax_attention() -> None:
    case = Case("grouped", 40, 4, 31, "eager", True, (), (), 0)
    x = case.tensors()
    k, v = (x[name].repeat_interleave(2, 1) for name in "kv")
    scores = x["beta"][:, None, None] * (x["q"] @ k.mT)
    future = torch.ones(31, 31, dtype=torch.bool).triu(1)
    want = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    assert_close(run_fast(case, x), want, **EXACT)


def test_the_dictionary_holds_the_sums_of_all_that_was_filed() -> None:
    case = Case("multi-query", 6, 4, 27, "plateau", True, (), (), 1)
    x = case.tensors()
    state = initial_state(case.config, BATCH, x["q"])
    _, state = ovq_attention(*(x[n] for n in "qkv"), x["beta"], state)
    filed = 24
    assert_close(state.key_sum.sum(2), x["k"][:, :, :filed].sum(2), **EXACT)
    assert_close(state.value_sum.sum(2), x["v"][:, :, :filed].sum(2), **EXACT)
    assert_close(state.key_count.sum(2), torch.full((BATCH, 1), 24.0).double())
    assert state.n_used.tolist() == [4, 4]  # 6 * 24 // 30
    assert (state.key_count[:, :, :4] > 0).all() and not state.key_count[:, :, 4:].any()
    assert_close(state.key[:, :, :3], x["k"][:, :, 24:], **EXACT)


def test_entries_that_nothing_joins_are_unchanged_bit_for_bit() -> None:
    case = Case("single", 64, 8, 64, "plateau", True, (), (), 5)
    x = {name: t.detach() for name, t in case.tensors().items()}
    state = initial_state(case.config, BATCH, x["q"])
    for begin in range(0, 64, 8):
        cut = slice(begin, begin + 8)
        before = state
        _, state = ovq_attention(*(x[n][:, :, cut] for n in "qkv"), x["beta"], state)
        same = before.key_count == state.key_count
        assert torch.equal(before.key_sum[same], state.key_sum[same])
        assert torch.equal(before.value_sum[same], state.value_sum[same])
    assert same.sum() > 64


@given(st.integers(1, 300), st.integers(1, 100), st.sampled_from(GROWTHS))
def test_sizes_grow_and_stay_in_bounds(n_token: int, n_entry: int, growth: str) -> None:
    sizes = dictionary_size(torch.arange(1, n_token + 1), n_entry, growth)
    assert (sizes.diff() >= 0).all()
    assert (1 <= sizes).all() and (sizes <= torch.arange(1, n_token + 1)).all()
    assert (sizes <= n_entry).all()
    assert GROWTH.keys() == set(GROWTHS)


def test_a_row_that_is_padding_alone_keeps_its_state() -> None:
    case = Case("single", 6, 4, 11, "plateau", True, (), (), 1)
    x = {name: t.detach() for name, t in case.tensors().items()}
    _, state = ovq_attention(
        *(x[n] for n in "qkv"), x["beta"], initial_state(case.config, 2, x["q"])
    )
    for mask in ([[False] * 11] * 2, [[False] * 11, [True] * 5 + [False] * 6]):
        y, after = ovq_attention(
            *(x[n] for n in "qkv"), x["beta"], state, Segments.of(torch.tensor(mask))
        )
        assert not y[0].any()
        for old, new in zip(state, after, strict=True):
            assert torch.equal(old[0], new[0])
    assert after.length.tolist() == [11, 16]


def test_the_module_is_the_formula_with_its_projections() -> None:
    torch.manual_seed(0)
    config = LMConfig(
        d_model=12, n_head=4, n_kv_head=2, d_k=K, d_v=V, n_entry=5, chunk=3, layer="gau"
    )
    mixer = OVQAttention(config).double()
    x = torch.randn(2, 10, 12).double()
    y, state, aux = mixer(x)
    q = F.normalize(mixer.query(x).unflatten(-1, (4, K)).transpose(1, 2), dim=-1)
    k, v, gate = mixer.key_value_gate(x).split([2 * K, 2 * V, 4 * V], -1)
    k = F.normalize(k.unflatten(-1, (2, K)).transpose(1, 2), dim=-1)
    v = F.silu(v).unflatten(-1, (2, V)).transpose(1, 2)
    beta = torch.full((4,), 8.0).double()
    heads, want = ovq_attention(q, k, v, beta, mixer.init_state(2))
    joined = heads.transpose(1, 2).flatten(2) * F.silu(gate)
    assert_close(y, mixer.output(joined), atol=1e-6, rtol=1e-6)
    assert aux is None and isinstance(state, OVQState)
    assert_close(state.key_sum, want.key_sum)


def test_beta_is_kept_from_underflow() -> None:
    mixer = OVQAttention(LMConfig(d_model=6, n_head=1, d_k=K, d_v=V, chunk=3, n_entry=4))
    with torch.no_grad():
        mixer.log_beta.fill_(9.0)
    y, _, _ = mixer(torch.randn(1, 12, 6))
    assert y.isfinite().all()


def test_under_autocast_the_dictionary_is_float32() -> None:
    mixer = OVQAttention(LMConfig(d_model=6, n_head=1, d_k=K, d_v=V, chunk=3, n_entry=4))
    with torch.autocast("cpu", torch.bfloat16):
        y, state, _ = mixer(torch.randn(1, 12, 6))
    assert all(x.dtype in (torch.float32, torch.long) for x in state)
    assert y.dtype == torch.bfloat16


def test_an_unknown_growth_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'plateau'"):
        LMConfig(growth="plato")
