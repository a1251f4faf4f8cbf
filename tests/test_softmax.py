"""The softmax twin and the window against their quadratic oracle, and against torch's own."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_case import BATCH, HEADS, AttentionCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.layers import RelativeBias
from vqlm.reference import softmax_attention_quadratic
from vqlm.segments import Segments
from vqlm.softmax import SoftmaxAttention, SoftmaxState, WindowAttention, softmax_attention

K, V = 5, 7
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@dataclasses.dataclass(frozen=True)
class Case(AttentionCase):
    d_k, d_v = K, V

    heads: str
    window: int
    block: int
    n_token: int
    window_only: bool
    document_starts: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    seed: int = 0

    def empty_state(self) -> SoftmaxState:
        groups = HEADS[self.heads][1]
        n_slot = self.window if self.window_only else 0
        key, value = (torch.zeros(BATCH, groups, n_slot, n, dtype=torch.float64) for n in (K, V))
        return SoftmaxState(key, value, torch.zeros(BATCH, dtype=torch.long))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    times = st.lists(st.integers(0, 22), max_size=3).map(tuple)
    return Case(
        draw(st.sampled_from(list(HEADS))), draw(st.integers(1, 9)), draw(st.integers(1, 9)),
        draw(st.integers(1, 23)), draw(st.booleans()), draw(times), draw(times),
        draw(st.integers(0, 999)),
    )  # fmt: skip


def run_fast(case: Case, x: dict[str, Tensor]) -> Tensor:
    state, bias = case.empty_state(), RelativeBias(x["u"], x["w"], x["rows"])
    bounds = [0, *sorted({c for c in case.cuts if 0 < c < case.n_token}), case.n_token]
    outputs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut = slice(begin, end)
        y, state = softmax_attention(
            x["q"][:, :, cut], x["k"][:, :, cut], x["v"][:, :, cut], bias, state,
            Segments.of(starts=case.starts()[:, cut]), block=case.block,
            window_only=case.window_only,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs, 2)


def run_oracle(case: Case, x: dict[str, Tensor]) -> Tensor:
    bias, documents = (x["u"], x["w"], x["rows"]), case.starts().cumsum(1)
    return softmax_attention_quadratic(x["q"], x["k"], x["v"], bias, documents, case.window_only)


def output_and_gradients(run: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    x = case.tensors()
    y = run(case, x)
    torch.manual_seed(case.seed + 1)
    grads = torch.autograd.grad(
        y, list(x.values()), torch.randn_like(y), allow_unused=True, materialize_grads=True
    )
    return (y, *grads)


@settings(max_examples=40)
@given(cases())
def test_equals_quadratic_oracle_with_gradients(case: Case) -> None:
    """Outputs and gradients of q, k, v, u, w, r, for any shapes, boundaries and cuts into calls."""
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window_only", [True, False])
@pytest.mark.parametrize(("documents", "cuts"), [((), ()), ((6, 13), ()), ((6,), (5, 6, 7))])
@pytest.mark.parametrize(("n_token", "window", "block"), [(1, 4, 4), (19, 3, 6), (17, 6, 3)])
def test_every_combination(
    heads: str,
    window_only: bool,
    documents: tuple[int, ...],
    cuts: tuple[int, ...],
    n_token: int,
    window: int,
    block: int,
) -> None:
    """The grid by hand, so that no combination is left to chance."""
    case = Case(heads, window, block, n_token, window_only, documents, cuts)
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize("heads", HEADS)
def test_without_bias_it_is_plain_causal_attention(heads: str) -> None:
    case = Case(heads, 4, 5, 17, window_only=False)
    x = case.tensors()
    zero = {name: torch.zeros_like(x[name]) for name in ("u", "w", "rows")}
    want = F.scaled_dot_product_attention(
        x["q"], x["k"], x["v"], is_causal=True, scale=1.0, enable_gqa=True
    )
    assert_close(run_fast(case, x | zero), want, **EXACT)


def test_a_window_as_long_as_the_sequence_is_the_twin() -> None:
    twin = Case("grouped", 16, 5, 17, window_only=False, cuts=(4, 9))
    window = dataclasses.replace(twin, window_only=True)
    assert_close(output_and_gradients(run_fast, window), output_and_gradients(run_fast, twin))


@pytest.mark.parametrize("kind", [SoftmaxAttention, WindowAttention])
def test_causality_by_jacobian_and_its_converse(kind: type[SoftmaxAttention]) -> None:
    """Nothing from the future; all of the past for the twin, exactly M + 1 keys for the window."""
    torch.manual_seed(1)
    config = LMConfig(d_model=6, n_head=2, d_k=K, d_v=V, window=3, block=4, layer="gau")
    mixer = kind(config).double()
    x = torch.randn(1, 13, 6, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda x: mixer(x)[0].sum(-1)[0], x)
    reached = full[:, 0].abs().sum(-1) > 1e-12  # [T, T]
    want = torch.ones(13, 13, dtype=torch.bool).tril()
    assert torch.equal(reached, want.triu(-3) if mixer.window_only else want)


@pytest.mark.parametrize("kind", [SoftmaxAttention, WindowAttention])
def test_only_the_twins_state_grows(kind: type[SoftmaxAttention]) -> None:
    torch.manual_seed(0)
    mixer = kind(LMConfig(d_model=6, n_head=2, n_kv_head=1, d_k=K, d_v=V, window=3, block=4))
    state, seen = mixer.init_state(2), 0
    for n_token in (1, 5, 2, 11):
        _, state, _ = mixer(torch.randn(2, n_token, 6), state)
        seen += n_token
        slots = 3 if mixer.window_only else seen
        assert (state.key.shape, state.value.shape) == ((2, 1, slots, K), (2, 1, slots, V))
        assert state.length.tolist() == [seen, seen]
        for x in (state.key, state.value):  # a view would keep the whole call alive
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
