"""VQ-attention against its quadratic oracle: outputs, gradients, splits, boundaries, padding."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attention_case import BATCH, HEADS, AttentionCase
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.codebook import Codebook, Quantized
from vqlm.config import LMConfig
from vqlm.fused import normalise
from vqlm.layers import RelativeBias
from vqlm.model import MIXERS
from vqlm.reference import softmax_attention_quadratic, vq_attention_quadratic
from vqlm.segments import Segments
from vqlm.vq import VQAttention, VQState, initial_state, vq_attention

K, V, S = 7, 11, 5
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@dataclasses.dataclass(frozen=True)
class Case(AttentionCase):
    d_k, d_v = K, V

    heads: str
    window: int
    block: int
    n_token: int
    cache: bool
    cache_grad: bool
    document_starts: tuple[int, ...]
    cuts: tuple[int, ...]
    seed: int

    @property
    def config(self) -> LMConfig:
        n_head, groups = HEADS[self.heads]
        return LMConfig(
            d_model=6, n_head=n_head, n_kv_head=groups, d_k=K, d_v=V, n_code=S,
            window=self.window, block=self.block, cache=self.cache, cache_grad=self.cache_grad,
        )  # fmt: skip

    def codebook(self) -> Codebook:
        torch.manual_seed(self.seed + 1)
        book = Codebook(HEADS[self.heads][1], S, K).double()
        book.key_sum.copy_(torch.randn_like(book.key_sum))
        return book

    def call_starts(self) -> list[int]:
        return [0, *sorted({c for c in self.cuts if 0 < c < self.n_token})]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_token = draw(st.integers(1, 23))
    times = st.lists(st.integers(0, 22), max_size=3).map(tuple)
    return Case(
        draw(st.sampled_from(list(HEADS))), draw(st.integers(1, 9)), draw(st.integers(1, 9)),
        n_token, draw(st.booleans()), draw(st.booleans()), draw(times), draw(times),
        draw(st.integers(0, 999)),
    )  # fmt: skip


def quantize(case: Case, book: Codebook, k: Tensor) -> tuple[Quantized, Tensor]:
    codes = book.codes()
    return book(k, codes, torch.ones(1, k.shape[2], dtype=torch.bool)), codes


def run_fast(case: Case, x: dict[str, Tensor], state: VQState | None = None) -> Tensor:
    book = case.codebook()
    keys, codes = quantize(case, book, x["k"])
    state = initial_state(case.config, BATCH, x["q"]) if state is None else state
    bias = RelativeBias(x["u"], x["w"], x["rows"])
    bounds = [*case.call_starts(), case.n_token]
    outputs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut = slice(begin, end)
        part = Quantized(keys.code[:, :, cut], keys.key[:, :, cut], keys.commitment, None)
        y, state = vq_attention(
            x["q"][:, :, cut], part, x["v"][:, :, cut], codes, bias, state,
            Segments.of(starts=case.starts()[:, cut]), block=case.block,
            cache_grad=case.cache_grad,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs, 2)


def run_oracle(case: Case, x: dict[str, Tensor]) -> Tensor:
    bounds = [*case.call_starts(), case.n_token]
    blocks = [b for lo, hi in zip(bounds, bounds[1:], strict=False)
              for b in range(lo, hi, case.block)]  # fmt: skip
    return vq_attention_quadratic(
        x["q"], x["k"], x["v"], case.codebook().codes(), (x["u"], x["w"], x["rows"]),
        case.starts().cumsum(1), blocks, case.cache, case.cache_grad,
    )  # fmt: skip


def output_and_gradients(run: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    x = case.tensors()
    y = run(case, x)
    torch.manual_seed(case.seed + 2)
    grads = torch.autograd.grad(
        y, list(x.values()), torch.randn_like(y), allow_unused=True, materialize_grads=True
    )
    return (y, *grads)


@given(cases())
def test_equals_quadratic_oracle_with_gradients(case: Case) -> None:
    """Outputs and gradients of q, k, v, u, w, r, for any shapes, boundaries and cuts into calls."""
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("cache_grad", [True, False])
@pytest.mark.parametrize("documents", [(), (6, 13)])
@pytest.mark.parametrize(
    ("n_token", "window", "block"),
    [(1, 4, 4), (3, 4, 5), (17, 4, 4), (19, 3, 6), (19, 6, 3), (23, 1, 7)],
)
def test_every_combination(
    heads: str,
    cache: bool,
    cache_grad: bool,
    documents: tuple[int, ...],
    n_token: int,
    window: int,
    block: int,
) -> None:
    """The full grid by hand, so that no combination is left to chance."""
    case = Case(heads, window, block, n_token, cache, cache_grad, documents, (), 0)
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


class Loud(Case):
    """Scores too large for exp: hundreds of times the range in which no maximum is subtracted."""

    def tensors(self) -> dict[str, Tensor]:
        x = super().tensors()
        x["q"].data *= 1e4
        return x


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cache", [True, False])
def test_scores_beyond_the_range_of_exp(heads: str, cache: bool) -> None:
    """Across documents, empty slots and calls, with gradients."""
    case = Loud(heads, 3, 4, 19, cache, True, (6,), (9,), 0)
    got, want = (output_and_gradients(run, case) for run in (run_fast, run_oracle))
    assert (case.tensors()["q"].abs() * 10).max() > 709
    assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_a_block_longer_than_a_call_is_the_call_and_takes_no_memory() -> None:
    case = Case("grouped", 3, 7, 7, True, True, (4,), (), 0)
    huge = dataclasses.replace(case, block=2**53)
    want, got = (output_and_gradients(run_fast, x) for x in (case, huge))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_block_decides_key_gradients_but_not_outputs() -> None:
    small = Case("multi-head", 4, 2, 19, True, True, (), (), 3)
    large = dataclasses.replace(small, block=8)
    y_small, y_large = (output_and_gradients(run_fast, c) for c in (small, large))
    assert_close(y_small[0], y_large[0], **EXACT)
    assert_close(y_small[3], y_large[3], **EXACT)  # values
    assert not torch.allclose(y_small[2], y_large[2])  # keys


def test_codebook_of_all_keys_is_softmax_attention() -> None:
    """When every key is its own code nothing is lost: k_hat = k."""
    case = Case("multi-head", 4, 4, 13, True, True, (), (), 5)
    x = case.tensors()
    q, k, v = x["q"][:1], x["k"][:1], x["v"][:1]
    codes = k[0].detach()
    book = Codebook(3, 13, K).double()
    book.key_sum.copy_(codes)
    keys = book(k, codes, torch.ones(1, 13, dtype=torch.bool))
    config = dataclasses.replace(case.config, n_code=13)
    bias = RelativeBias(*(torch.zeros_like(x[n]) for n in ("u", "w", "rows")))
    y, _ = vq_attention(q, keys, v, codes, bias, initial_state(config, 1, q), block=4)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert_close(y, want, **EXACT)


def test_state_is_not_changed_behind_the_caller() -> None:
    torch.manual_seed(0)
    mixer = VQAttention(Case("grouped", 4, 4, 9, True, True, (), (), 0).config).double()
    _, state, _ = mixer(torch.randn(2, 9, 6, dtype=torch.float64))
    before = [x.clone() for x in state]
    first = mixer(torch.randn(2, 7, 6, dtype=torch.float64), state)[1]
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert not torch.equal(first.value_sum, state.value_sum)


@pytest.mark.parametrize("cache", [True, False])
def test_causality_by_jacobian_and_its_converse(cache: bool) -> None:
    """Nothing from the future; and with the cache the past matters beyond the window."""
    torch.manual_seed(1)
    config = LMConfig(
        d_model=6, n_head=2, d_k=K, d_v=V, n_code=S, window=3, block=2, cache=cache, layer="gau"
    )
    mixer = VQAttention(config).double()
    x = torch.randn(1, 17, 6, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda x: mixer(x)[0].sum(-1)[0], x)
    jacobian = full[:, 0].abs().sum(-1)  # [T, T]
    assert_close(jacobian, jacobian.tril(), atol=1e-12, rtol=0)
    assert (jacobian.diagonal() > 0).all()
    beyond = jacobian.tril(-(3 + 2 + 1))
    assert bool(beyond.any()) == cache


def test_window_mismatch_is_refused() -> None:
    case = Case("single", 4, 4, 5, True, True, (), (), 0)
    x = case.tensors()
    other = initial_state(dataclasses.replace(case.config, window=6), BATCH, x["q"])
    with pytest.raises(ValueError, match="window of 6 wants 7"):
        run_fast(case, x, other)


@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("cache_grad", [True, False])
def test_normalising_on_the_way_is_normalising_before(heads: str, cache_grad: bool) -> None:
    """Queries in the kernel, keys in the codebook; lengths 3, 7, 8 leave a last block cut short."""
    case = Case(heads, 3, 4, 23, True, cache_grad, (5,), (), 0)
    torch.manual_seed(1)
    d_out = torch.randn(BATCH, HEADS[heads][0], case.n_token, case.d_v).double()

    def run(inside: bool) -> tuple[Tensor, ...]:
        x, book, scale = case.tensors(), case.codebook(), 0.7
        q, k = (x[n] if inside else normalise(x[n], scale) for n in "qk")
        valid = torch.ones(1, case.n_token, dtype=torch.bool)
        keys = book(k, book.codes(), valid, True, scale if inside else None)
        y, _ = vq_attention(
            q, keys, x["v"], book.codes(), RelativeBias(x["u"], x["w"], x["rows"]),
            initial_state(case.config, BATCH, q), Segments.of(starts=case.starts()),
            block=case.block, cache_grad=cache_grad, scale=scale if inside else None,
        )  # fmt: skip
        assert keys.stats is not None
        loss = (y * d_out).sum() + 0.3 * keys.commitment
        return y, *torch.autograd.grad(loss, list(x.values())), *keys.stats

    for got, want in zip(run(True), run(False), strict=True):
        assert_close(got, want, **EXACT)


@pytest.mark.parametrize("n_token", [61, 1021])
def test_half_precision_is_within_twice_the_error_of_plain_softmax(n_token: int) -> None:
    """Between the products weights and sums are float32, and so is the state: outputs and gradients
    are at most twice as far from float64's as those of softmax in bfloat16 over the same keys."""
    case = Case("multi-head", 8, 8, n_token, True, True, (), (), 0)
    x, book = case.tensors(), case.codebook()
    keys, _ = quantize(case, book, x["k"])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(case.n_token, case.n_token, dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        like, single = q.float(), book.float()
        bias = RelativeBias(*(torch.zeros_like(x[n]).float() for n in ("u", "w", "rows")))
        with torch.autocast("cpu", torch.bfloat16):
            part = keys._replace(key=k)
            state = initial_state(case.config, BATCH, like)
            y, state = vq_attention(q, part, v, single.codes(), bias, state, block=case.block)
        assert y.dtype == v.dtype and state.value_sum.dtype == state.value.dtype == like.dtype
        filed = max(n_token - case.config.window, 0)
        assert (state.value_count.sum(-1) == filed).all()
        return y

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x["q"], keys.key, x["v"]))
        y = attention(q, k, v)
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(y, [q, v], torch.randn(y.shape).to(y.dtype))]

    exact = run(plain, torch.float64)
    for mine, half, want in zip(
        run(ours, torch.bfloat16), run(plain, torch.bfloat16), exact, strict=True
    ):
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (mine, half))
        assert error <= 2 * allowed


@pytest.mark.parametrize("mixers", ["vq", "softmax", "window"])
def test_a_learned_temperature_multiplies_all_scores_of_its_head(mixers: str) -> None:
    """Outputs and gradients of the layer against the oracle over queries times their factor, one of
    which is at its bound."""
    torch.manual_seed(0)
    config = LMConfig(
        d_model=6, n_head=4, n_kv_head=2, d_k=K, d_v=V, n_code=S, window=3, block=4,
        mixers=(mixers,), learned_temperature=True,
    )  # fmt: skip
    mixer = MIXERS[mixers](config).double()
    project = mixer.project
    with torch.no_grad():
        for parameter in project.parameters():
            parameter.add_(torch.randn_like(parameter))
        project.log_factor.copy_(torch.tensor([-1.0, 0.0, 0.8, 9.0]))
    x = torch.randn(BATCH, 19, 6, dtype=torch.float64, requires_grad=True)
    learned = [x, *project.parameters()]

    def oracle() -> Tensor:
        query = rearrange(project.query(x), "b t (h k) -> b h t k", k=K)
        factor = project.log_factor.exp().minimum(torch.tensor(40 / K**0.5, dtype=torch.float64))
        query = K**-0.25 * query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        _, key, value, gate = project(x)
        bias, documents = project.bias(), torch.zeros(BATCH, 19)
        query = query * factor[:, None, None]
        if mixers == "vq":
            codes, blocks = mixer.codebook.codes(), list(range(0, 19, 4))
            y = vq_attention_quadratic(query, key, value, codes, bias, documents, blocks)
        else:
            only = mixers == "window"
            y = softmax_attention_quadratic(query, key, value, bias, documents, only)
        return project.merge(y, gate)

    y, want = mixer(x)[0], oracle()
    along = torch.randn_like(y)
    mine, grads = (torch.autograd.grad(out, learned, along, allow_unused=True) for out in (y, want))
    assert_close(y, want, **EXACT)
    assert grads[-1] is not None
    for got, wanted in zip(mine, grads, strict=True):
        assert_close(got, wanted, atol=1e-9, rtol=1e-9)
    factor_gradient = dict(zip([n for n, _ in project.named_parameters()], mine[1:], strict=True))
    assert (factor_gradient["log_factor"] != 0).tolist() == [True, True, True, False]
