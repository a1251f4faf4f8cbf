"""The whole model: however a stream is cut, padded and mixed with others, the logits are the same.

One scenario, many draws: rows of several documents are fed in calls of any length, with padding in
any pattern and state carried on.  The logits at a document's tokens must be those that the document
gets alone, in one plain call.
"""

import dataclasses
import functools
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.model import LM, LMState

VOCAB, WINDOW, BLOCK = 17, 3, 4
TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 1e-4, "rtol": 1e-4},
}
MIXERS = {
    "vq": ("vq",), "softmax": ("softmax",), "window": ("window",),
    "ovq": ("ovq",), "mixed": ("window", "vq", "softmax"), "hybrid": ("window", "ovq"),
    "gated-deltanet": ("gated-deltanet",), "mamba2": ("mamba2",),
}  # fmt: skip
HEADS = {
    "gated": dict(layer="gau", n_head=1),
    "gated-multi": dict(layer="gau", n_head=2),
    "multi-query": dict(n_head=3, n_kv_head=1),
    "multi-head": dict(n_head=2),
}
VARIANTS = {
    "plain": {},
    "positions": dict(absolute_position=True, position_base=50.0),
    "tied": dict(tie_embedding=True, final_norm=False, output_scale=0.5),
    "both": dict(absolute_position=True, tie_embedding=True),
    "cacheless": dict(cache=False),
    "convolved": dict(conv_width=3),
    "warmed": dict(learned_temperature=True, output_gate=True),
    "shifted": dict(shifted_keys=True),
    "all": dict(shifted_keys=True, conv_width=3, learned_temperature=True, output_gate=True),
    "rotary": dict(positions="rotary", conv_width=2, d_k=6, position_base=50.0),
}


@functools.cache
def model(
    mixers: str, heads: str = "multi-head", variant: str = "plain",
    dtype: torch.dtype = torch.float64,
) -> LM:  # fmt: skip
    """A tiny model in which every parameter matters; no test may change it."""
    config = LMConfig(
        vocab_size=VOCAB, n_layer=3 if mixers == "mixed" else 2, d_model=6, d_v=7, d_ff=8,
        n_code=5, n_entry=4, chunk=3, window=WINDOW, block=BLOCK, mixers=MIXERS[mixers],
        **(dict(d_k=5) | HEADS[heads] | VARIANTS[variant]),
    )  # fmt: skip
    torch.manual_seed(0)
    lm = LM(config).double()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
        for book in filter(None, lm.codebooks()):
            book.key_sum.copy_(torch.randn_like(book.key_sum))
    return lm.to(dtype).eval().requires_grad_(False)


@dataclasses.dataclass
class Scenario:
    n_row: int
    calls: list[tuple[int, str]]
    """Tokens and kind of padding of each call."""
    share: float
    """How often a document begins."""
    seed: int

    def inputs(self) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Tokens, mask and starts of each call."""
        rng = torch.Generator().manual_seed(self.seed)
        made = []
        for n_token, padding in self.calls:
            shape = (self.n_row, n_token)
            starts = torch.rand(shape, generator=rng) < self.share if self.share else None
            n_real = torch.randint(0, n_token + 1, (self.n_row, 1), generator=rng)
            index = torch.arange(n_token)
            mask = {
                "none": None,
                "full": torch.ones(shape, dtype=torch.bool),
                "left": index >= n_token - n_real,
                "right": index < n_real,
                "any": torch.rand(shape, generator=rng) < 0.6,
            }[padding]
            made.append((torch.randint(VOCAB, shape, generator=rng), mask, starts))
        return made


paddings = st.sampled_from(["none", "full", "left", "right", "any"])
calls = st.lists(st.tuples(st.integers(1, 9), paddings), min_size=1, max_size=5)
scenarios = st.builds(
    Scenario, st.integers(1, 3), calls, st.sampled_from([0, 0, 0.1, 0.4]), st.integers(0, 9999)
)


def documents(scenario: Scenario, logits: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and logits of every document, gathered token by token."""
    found = []
    for row in range(scenario.n_row):
        current: tuple[list[Tensor], list[Tensor]] = ([], [])
        found.append(current)
        for (tokens, mask, starts), scores in zip(scenario.inputs(), logits, strict=True):
            for t in range(tokens.shape[1]):
                if mask is not None and not mask[row, t]:
                    continue
                if starts is not None and starts[row, t]:
                    current = ([], [])
                    found.append(current)
                current[0].append(tokens[row, t])
                current[1].append(scores[row, t])
    return [(torch.stack(tokens), torch.stack(scores)) for tokens, scores in found if tokens]


def check(lm: LM, scenario: Scenario) -> None:
    state, logits = None, []
    for tokens, mask, starts in scenario.inputs():
        before = None if state is None else [x.clone() for x in state.tensors()]
        out = lm(tokens, state, mask=mask, starts=starts)
        if state is not None:
            assert all(map(torch.equal, before, state.tensors()))
        if mask is not None:
            assert not out.logits[~mask].any()
        state = out.state
        logits.append(out.logits)
    tolerance = TOLERANCE[lm.embedding.weight.dtype]
    for tokens, scores in documents(scenario, logits):
        assert_close(scores, lm(tokens[None]).logits[0], **tolerance)


@settings(max_examples=40)
@given(
    st.sampled_from(list(MIXERS)), st.sampled_from(list(HEADS)), st.sampled_from(list(VARIANTS)),
    scenarios,
)  # fmt: skip
def test_any_calls_padding_and_documents(
    mixers: str, heads: str, variant: str, scenario: Scenario
) -> None:
    check(model(mixers, heads, variant), scenario)


FIXED = Scenario(3, [(7, "any"), (1, "none"), (5, "left"), (1, "any"), (9, "right")], 0.1, 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mixers", MIXERS)
def test_every_architecture(mixers: str, heads: str, variant: str) -> None:
    """The grid by hand, so that no combination is left to chance."""
    if variant != "cacheless" or "vq" in MIXERS[mixers]:
        check(model(mixers, heads, variant), FIXED)


@pytest.mark.parametrize(("heads", "variant"), list(zip(HEADS, VARIANTS, strict=False)))
@pytest.mark.parametrize("mixers", MIXERS)
def test_every_architecture_in_single_precision(mixers: str, heads: str, variant: str) -> None:
    check(model(mixers, heads, variant, torch.float32), FIXED)


@pytest.mark.parametrize("mixers", MIXERS)
def test_token_by_token(mixers: str) -> None:
    check(model(mixers), Scenario(2, [(1, "none")] * 19, 0, 0))
    check(model(mixers), Scenario(2, [(1, "any")] * 25, 0.1, 1))


@pytest.mark.parametrize("mixers", MIXERS)
def test_a_call_of_padding_alone_changes_nothing_that_counts(mixers: str) -> None:
    lm, tokens = model(mixers), torch.arange(10).reshape(2, 5)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    out = lm(tokens)
    padded = lm(tokens, out.state, mask=nothing, starts=~nothing)
    assert not padded.logits.any()
    assert torch.equal(padded.state.length, out.state.length)
    want = lm(tokens + 3, out.state).logits
    assert_close(lm(tokens + 3, padded.state).logits, want, **TOLERANCE[torch.float64])


def influence(lm: LM, n_token: int) -> Tensor:
    """[T, T]: how much the logits (row) depend on the token (column).

    Every position has a token of its own, so that the gradient of the embedding's rows is it.
    """
    weight = lm.embedding.weight.detach()[:n_token].clone().requires_grad_()
    out = torch.func.functional_call(lm, {"embedding.weight": weight}, torch.arange(n_token)[None])
    rows = [torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in out.logits[0]]
    return torch.stack(rows).abs().sum(-1)


@pytest.mark.parametrize("variant", ["plain", "cacheless", "positions"])
@pytest.mark.parametrize("mixers", MIXERS)
def test_causality_by_jacobian_and_its_converse(mixers: str, variant: str) -> None:
    """Nothing from the future; all of the past, but for windows exactly M tokens a layer."""
    lm = model(mixers, variant=variant)
    n_token = 14
    reached = influence(lm, n_token) > 1e-12
    want = torch.ones(n_token, n_token, dtype=torch.bool).tril()
    if mixers == "window" or (mixers == "vq" and variant == "cacheless"):
        want = want.triu(-lm.config.n_layer * WINDOW)
    assert torch.equal(reached, want)


@pytest.mark.parametrize("mixers", MIXERS)
def test_another_token_is_felt_as_far_as_the_window_or_forever(mixers: str) -> None:
    lm, tokens = model(mixers), torch.arange(40)[None] % VOCAB
    changed = tokens.clone()
    changed[0, 5] = 0
    difference = (lm(tokens).logits - lm(changed).logits)[0].abs().amax(-1)
    assert not difference[:5].any()
    reach = lm.config.n_layer * WINDOW
    assert (difference[5 : 5 + reach + 1] > 1e-9).all()
    assert (difference[5 + reach + 1 :].amax() > 1e-9) == (mixers != "window")


@pytest.mark.parametrize("mixers", MIXERS)
def test_forward_changes_neither_parameters_nor_buffers_nor_state(mixers: str) -> None:
    lm = LM(dataclasses.replace(model(mixers).config, dropout_residual=0.1)).double().train()
    tokens = torch.randint(VOCAB, (2, 11))
    state = lm(tokens).state.detach()
    frozen = [x.clone() for x in state.tensors()]
    before = {name: x.clone() for name, x in lm.state_dict().items()}
    out = lm(tokens, state, mask=torch.rand(2, 11) < 0.7, starts=torch.rand(2, 11) < 0.1)
    (out.logits.sum() + out.commitment()).backward()
    assert all(torch.equal(before[name], x) for name, x in lm.state_dict().items())
    assert all(map(torch.equal, frozen, state.tensors()))


@pytest.mark.parametrize("tied", [False, True])
def test_the_scale_is_on_the_logits_with_their_bias(tied: bool) -> None:
    plain = LM(dataclasses.replace(model("vq").config, tie_embedding=tied, output_scale=1.0))
    scaled = LM(dataclasses.replace(plain.config, output_scale=0.25))
    with torch.no_grad():
        (plain.output_bias if tied else plain.output.bias).normal_()
    scaled.load_state_dict(plain.state_dict())
    tokens = torch.arange(9)[None]
    assert torch.equal(scaled(tokens).logits, plain(tokens).logits / 4)


def test_state_helpers() -> None:
    lm = model("mixed")
    state = lm(torch.arange(8).reshape(2, 4)).state
    again = state.replace_tensors([x.clone() for x in state.tensors()])
    assert isinstance(again, LMState) and [type(s) for s in again.layers] == [
        type(s) for s in state.layers
    ]
    assert all(map(torch.equal, again.tensors(), state.tensors()))
    assert state.bytes() == sum(x.numel() * x.element_size() for x in state.tensors())
    trained = LM(lm.config)(torch.arange(8).reshape(2, 4)).state
    assert any(x.requires_grad for x in trained.tensors())
    assert not any(x.requires_grad for x in trained.detach().tensors())


def test_gradients_flow_into_an_earlier_call_unless_cut() -> None:
    lm = model("vq")
    weight = lm.embedding.weight.detach().clone().requires_grad_()

    def run(tokens: Tensor, state: LMState | None, weight: Tensor = weight) -> tuple[Tensor, ...]:
        return torch.func.functional_call(lm, {"embedding.weight": weight}, (tokens, state))

    state = run(torch.arange(8)[None], None).state
    later = torch.arange(8, 12)[None]
    for carried, reaches in ((state, True), (state.detach(), False)):
        loss = run(later, carried).logits.sum()
        gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        assert bool(gradient[:8].any()) == reaches and bool(gradient[8:12].any())


def test_wrong_inputs_are_refused() -> None:
    lm = model("mixed")
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="the state has 3 rows, tokens have 2"):
        lm(tokens, lm.init_state(3))
    with pytest.raises(ValueError, match="neither of them 0"):
        lm(tokens[:, :0])


COMPILED = """
import sys, torch
from vqlm import LM, LMConfig
backend, layer = sys.argv[1:]
config = LMConfig(
    n_layer=2, d_model=8, n_head=1, d_k=4, d_v=8, n_code=4, window=4, block=4, layer=layer
)
lm, tokens = LM(config), torch.randint(256, (2, 9))
sides = []
for compiled in (False, True):
    if compiled:
        lm.compile_parts(backend)
    loss = lm(tokens, targets=tokens).objective(0.1, 18).loss
    sides.append([loss, *torch.autograd.grad(loss, list(lm.parameters()))])
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
assert not torch._dynamo.utils.counters["graph_break"]
for plain, ours in zip(*sides):
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)
"""


@pytest.mark.parametrize(
    ("backend", "layer"), [("aot_eager", "swiglu"), ("aot_eager", "gau"), ("inductor", "swiglu")]
)
def test_compiled_parts_are_whole_graphs_and_give_the_same(backend: str, layer: str) -> None:
    """In a process of its own: what checks shapes in the tests can't be compiled."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("compiling for a CPU needs g++")
    subprocess.run([sys.executable, "-c", COMPILED, backend, layer], check=True)
