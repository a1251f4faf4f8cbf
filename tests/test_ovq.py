"""OVQ-attention against its token-by-token oracle, and what the mathematics promises."""

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

from vqlm import config, dictionary
from vqlm.config import ENTRY_READS, FILINGS, FOUNDERS, GROWTHS, LMConfig
from vqlm.dictionary import Rules, dictionary_size, noise
from vqlm.ovq import OVQAttention, OVQState, initial_state, ovq_attention
from vqlm.reference import OVQChoices, ovq_attention_token_by_token
from vqlm.segments import Segments

K, V = 5, 7
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@dataclasses.dataclass(frozen=True)
class Case(AttentionCase):
    heads: str
    n_entry: int
    chunk: int
    n_token: int
    rules: Rules = Rules()
    cuts: tuple[int, ...] = ()
    document_starts: tuple[int, ...] = ()
    seed: int = 0

    @property
    def config(self) -> LMConfig:
        n_head, groups = HEADS[self.heads]
        return LMConfig(
            d_model=6, n_head=n_head, n_kv_head=groups, d_k=K, d_v=V, n_entry=self.n_entry,
            chunk=self.chunk, mixers=("ovq",),
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


rules = st.builds(
    Rules, st.sampled_from(GROWTHS), st.integers(1, 40), st.sampled_from(FOUNDERS),
    st.sampled_from(FILINGS), st.sampled_from([None, 0.05, 0.9]), st.sampled_from(ENTRY_READS),
    st.integers(0, 9),
).map(lambda r: r._replace(rate=None) if r.filing == "merge" else r)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    times = st.lists(st.integers(0, 28), max_size=3).map(tuple)
    return Case(
        draw(st.sampled_from(list(HEADS))), draw(st.integers(1, 33)), draw(st.integers(1, 9)),
        draw(st.integers(1, 29)), draw(rules), draw(times), draw(times), draw(st.integers(0, 999)),
    )  # fmt: skip


def run_fast(case: Case, x: dict[str, Tensor]) -> Tensor:
    state = initial_state(case.config, BATCH, x["q"])
    bounds = [0, *sorted({c for c in case.cuts if 0 < c < case.n_token}), case.n_token]
    outputs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut = slice(begin, end)
        y, state = ovq_attention(
            x["q"][:, :, cut], x["k"][:, :, cut], x["v"][:, :, cut], x["beta"], state,
            Segments.of(starts=case.starts()[:, cut]), case.rules,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs, 2)


def run_oracle(case: Case, x: dict[str, Tensor]) -> Tensor:
    def size(n_token: int, n_entry: int) -> int:
        return int(case.rules.size(torch.tensor([n_token]), n_entry))

    draws = noise(torch.tensor([0]), HEADS[case.heads][1], case.n_token, case.rules.seed)[0]
    choices = OVQChoices(
        case.n_entry, case.chunk, size, case.rules.read, case.rules.rate, case.rules.founders,
        case.rules.filing, draws,
    )  # fmt: skip
    rows = []
    for b in range(BATCH):
        begins = case.starts()[b].nonzero()[:, 0].tolist()
        bounds = [0, *(t for t in begins if t > 0), case.n_token]
        parts = [
            ovq_attention_token_by_token(
                *(x[name][b : b + 1, :, lo:hi] for name in "qkv"), x["beta"], choices
            )
            for lo, hi in zip(bounds, bounds[1:], strict=False)
        ]
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def output_and_gradients(run: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    x = case.tensors()
    y = run(case, x)
    torch.manual_seed(case.seed + 2)
    grads = torch.autograd.grad(y, list(x.values()), torch.randn_like(y))
    return (y, *grads)


@settings(max_examples=30)
@given(cases())
def test_outputs_and_gradients_equal_the_oracle(case: Case) -> None:
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("n_entry", [1, 50])
def test_grid_of_cases(heads: str, growth: str, n_entry: int) -> None:
    case = Case(heads, n_entry, 4, 27, Rules(growth, span=20), (5, 6, 19), (9,), 3)
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize("read", ENTRY_READS)
@pytest.mark.parametrize("founders", FOUNDERS)
@pytest.mark.parametrize("starts", [(), (9,)])
def test_every_rule(read: str, founders: str, starts: tuple[int, ...]) -> None:
    rate = 0.2 if starts else None
    case = Case(
        "grouped", 9, 4, 37, Rules("eager", 20, founders, "join", rate, read, 5), (14,), starts
    )
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


def test_with_an_entry_for_every_token_it_is_softmax_attention() -> None:
    case = Case("grouped", 40, 4, 31, Rules("eager"), seed=0)
    x = case.tensors()
    k, v = (x[name].repeat_interleave(2, 1) for name in "kv")
    scores = x["beta"][:, None, None] * (x["q"] @ k.mT)
    future = torch.ones(31, 31, dtype=torch.bool).triu(1)
    want = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    assert_close(run_fast(case, x), want, **EXACT)


def test_the_dictionary_holds_the_sums_of_all_that_was_filed() -> None:
    case = Case("multi-query", 6, 4, 27, Rules("plateau"), seed=1)
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
    case = Case("single", 64, 8, 64, Rules("plateau"), seed=5)
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
    sizes = dictionary_size(torch.arange(1, n_token + 1), n_entry, growth, 150)
    assert (sizes.diff() >= 0).all()
    assert (1 <= sizes).all() and (sizes <= torch.arange(1, n_token + 1)).all()
    assert (sizes <= n_entry).all()


def test_the_config_knows_every_rule() -> None:
    assert set(dictionary.GROWTH) == set(config.GROWTHS)
    assert set(dictionary.FOUNDERS) == set(config.FOUNDERS)
    assert set(dictionary.READS) == set(config.ENTRY_READS)


def test_a_row_that_is_padding_alone_keeps_its_state() -> None:
    case = Case("single", 6, 4, 11, Rules("plateau"), seed=1)
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


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("growth", ["eager", "plateau"])
def test_merging(heads: str, growth: str) -> None:
    # Row 1 begins a document where row 0 doesn't, so that only one has a full chunk, or entries.
    case = Case(heads, 9, 4, 37, Rules(growth, filing="merge"), (14, 15), (3, 9), 3)
    assert_close(
        output_and_gradients(run_fast, case), output_and_gradients(run_oracle, case), **EXACT
    )


@pytest.mark.parametrize(
    "rules",
    [
        Rules(founders="none"),
        Rules(read="no"),
        Rules(rate=1.5),
        Rules(filing="?"),
        Rules(filing="merge", rate=0.1),
    ],
)
def test_rules_that_do_not_exist_are_refused(rules: Rules) -> None:
    with pytest.raises(ValueError, match="unknown|rate"):
        rules.check()


def test_token_by_token_equals_one_call_and_padding_is_nothing() -> None:
    case = Case("grouped", 7, 4, 19, seed=2)
    one_by_one = dataclasses.replace(case, cuts=tuple(range(1, 19)))
    x = case.tensors()
    assert_close(run_fast(one_by_one, x), run_fast(case, x), **EXACT)
    padded = torch.arange(19) < torch.tensor([[19], [13]])
    y, state = ovq_attention(
        *(x[n] for n in "qkv"), x["beta"], initial_state(case.config, BATCH, x["q"]),
        Segments.of(padded),
    )  # fmt: skip
    want = run_fast(case, x)
    assert_close(y[0], want[0], **EXACT)
    assert_close(y[1, :, :13], want[1, :, :13], **EXACT)
    assert not y[1, :, 13:].any() and state.length.tolist() == [19, 13]
    assert_close(state.key[1, :, 0], x["k"][1, :, 12])


@pytest.mark.parametrize("lengths", [(12, 9), (8, 12), (3, 11)])
def test_a_state_is_that_of_its_row_whatever_is_read_beside_it(lengths: tuple[int, int]) -> None:
    """Behind the open tokens as well, where nothing but a checkpoint's reader looks."""
    case = Case("grouped", 7, 4, 12, seed=2)
    x = {name: t.detach() for name, t in case.tensors().items()}
    told = [x[n] for n in "qkv"]
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    empty = initial_state(case.config, BATCH, x["q"])
    _, both = ovq_attention(*told, x["beta"], empty, Segments.of(real))
    for row, length in enumerate(lengths):
        alone = (z[row : row + 1, :, :length] for z in told)
        _, state = ovq_attention(*alone, x["beta"], initial_state(case.config, 1, x["q"]))
        for got, want in zip(both, state, strict=True):
            assert_close(got[row : row + 1], want, **EXACT)
        opened = length % 4
        assert not both.key[row, :, opened:].any() and not both.value[row, :, opened:].any()


def test_float32_is_close_to_float64() -> None:
    case = Case("grouped", 24, 16, 300, seed=4)
    x = case.tensors()
    want = output_and_gradients(run_fast, case)
    single = {name: t.detach().float().requires_grad_() for name, t in x.items()}
    y = run_fast(case, single)
    torch.manual_seed(case.seed + 2)
    d = torch.randn_like(want[0])
    got = (y, *torch.autograd.grad(y, list(single.values()), d.float()))
    assert y.dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max()


def test_bfloat16_inputs_are_computed_with_in_float32() -> None:
    case = Case("grouped", 24, 16, 100, seed=4)
    x = {name: t.detach().bfloat16() for name, t in case.tensors().items()}
    state = initial_state(case.config, BATCH, x["q"])
    y, after = ovq_attention(*(x[n] for n in "qkv"), x["beta"], state)
    assert y.dtype == torch.float32 and after.key_sum.dtype == torch.float32
    wide = {name: t.float() for name, t in x.items()}
    want, _ = ovq_attention(*(wide[n] for n in "qkv"), wide["beta"], state)
    assert torch.equal(y, want)


def test_the_state_behind_the_caller_is_not_touched() -> None:
    case = Case("grouped", 9, 4, 24, seed=6)
    x = {name: t.detach() for name, t in case.tensors().items()}
    _, state = ovq_attention(
        *(x[n] for n in "qkv"), x["beta"], initial_state(case.config, BATCH, x["q"])
    )
    kept = [t.clone() for t in state]
    ovq_attention(*(x[n] for n in "qkv"), x["beta"], state)
    ovq_attention(*(x[n][:, :, :1] for n in "qkv"), x["beta"], state)
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))


def test_noise_looks_uniform_and_depends_on_all_of_its_arguments() -> None:
    draws = noise(torch.tensor([0, 7]), 3, 4000, 1)
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.002
    assert torch.equal(draws[1, :, :-7], draws[0, :, 7:])
    assert not torch.isclose(draws[0, 0], draws[0, 1]).any()
    assert not torch.isclose(draws, noise(torch.tensor([0, 7]), 3, 4000, 2)).any()
