"""OVQ-attention where tokens repeat, under autocast, of odd strides; models in half precision."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.dictionary import Rules
from vqlm.model import LM
from vqlm.ovq import OVQAttention, OVQState, initial_state, ovq_attention
from vqlm.probe import attention_mass
from vqlm.segments import Segments

SIZES = LMConfig(
    vocab_size=300, n_layer=2, d_model=32, n_head=2, d_k=16, d_v=16, n_entry=24, chunk=16, window=8,
    block=16, mixers=("ovq",),
)  # fmt: skip


def text_with_ties(n_token: int, n_id: int) -> Tensor:
    """Frequencies of Zipf's law, and a line of one token that is longer than window and chunk."""
    frequency = 1 / torch.arange(1, n_id + 1.0)
    tokens = torch.multinomial(frequency.expand(2, -1), n_token, replacement=True)
    tokens[:, 60:130] = 7
    return tokens


@pytest.mark.parametrize("cut", [1, 7, 100])
@pytest.mark.parametrize("mixers", [("ovq",), ("window", "ovq")], ids=str)
@pytest.mark.parametrize(
    "rules", [{}, {"growth": "eager"}, {"growth": "eager", "filing": "merge"}], ids=str
)
@torch.no_grad()
def test_equal_tokens_go_where_they_go_whatever_the_calls(
    rules: dict[str, Any], mixers: tuple[str, ...], cut: int
) -> None:
    """Their keys are equal, and products of equal keys are not, to the last bit, in calls of other
    lengths: what is decided by them is decided alike."""
    for seed in (0, 3):  # with which each rule, compared to the last bit, went wrong
        torch.manual_seed(seed)
        lm = LM(dataclasses.replace(SIZES, mixers=mixers, **rules)).double().eval()
        tokens = text_with_ties(160, 60)
        state, parts = None, []
        for part in tokens.split(cut, 1):
            out = lm(part, state)
            state = out.state
            parts.append(out.logits)
        assert_close(torch.cat(parts, 1), lm(tokens).logits, atol=1e-10, rtol=1e-10)


def drawn(n_token: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and beta that want gradients."""
    torch.manual_seed(0)
    query, key = (F.normalize(torch.randn(2, h, n_token, 16), dim=-1) for h in (2, 2))
    made = query, key, torch.randn(2, 2, n_token, 16), torch.tensor([3.0, 8.0])
    return [x.to(dtype).requires_grad_() for x in made]


def test_the_function_and_its_backward_pass_leave_autocast_outside() -> None:
    gradients = []
    for cast in (False, True):
        given = drawn(40, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, _ = ovq_attention(*given, initial_state(SIZES, 2, given[0]))
            (out * torch.linspace(-1, 1, 16)).sum().backward()
        gradients.append([out.detach(), *(x.grad for x in given)])
    assert gradients[0][0].dtype == torch.float32
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@torch.no_grad()
def test_probes_see_what_the_mixer_computes_under_autocast() -> None:
    torch.manual_seed(0)
    lm = LM(SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        mass = attention_mass(lm, text_with_ties(200, 60)[:1])
    assert all(0 < float(x) < 1 for x in mass[0].near)


def test_states_and_their_gradients_of_any_strides() -> None:
    """A document begins in the call, after a state whose sums are laid out the other way."""
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, 9] = True
    found = []
    for turned in (False, True):
        given = drawn(40)
        state = initial_state(SIZES, 2, given[0])
        state = ovq_attention(*(x[:, :, :32] for x in given[:3]), given[3], state)[1]
        if turned:
            turn = [x.mT.contiguous().mT for x in (state.key_sum, state.value_sum)]
            state = state._replace(key_sum=turn[0], value_sum=turn[1])
        segments = Segments.of(starts=starts)
        out, after = ovq_attention(*given, state, segments)
        weight = torch.linspace(-1, 1, 24)
        total = (after.key_sum.mT * weight).sum() + (after.value_sum.mT * weight).sum()
        (out.sum() + total).backward()
        found.append([out.detach(), *(x.grad for x in given)])
    assert_close(found[1], found[0])


def test_no_token_after_an_open_chunk() -> None:
    mixer = OVQAttention(SIZES)
    _, state, _ = mixer(torch.randn(2, 6, 32))
    y, after, _ = mixer(torch.randn(2, 0, 32), state)
    assert y.shape == (2, 0, 32)
    assert isinstance(after, OVQState)
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_growth_over_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="span=0, but it must be at least 1"):
        Rules(growth="linear", span=0).check()


MIXERS = ["vq", "ovq", "window", "softmax", "gated-deltanet", "mamba2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["swiglu", "gau"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_models_whose_weights_have_half_the_bits(
    mixer: str, layer: str, dtype: torch.dtype
) -> None:
    """Forward, backward, and a stream in two calls."""
    torch.manual_seed(0)
    lm = LM(dataclasses.replace(SIZES, mixers=(mixer,), layer=layer, n_code=8)).eval()
    tokens = torch.randint(3, 300, (2, 40))
    want = lm(tokens).logits
    lm = lm.to(dtype)
    got = lm(tokens).logits
    assert got.dtype == dtype
    near = 0.2 if dtype == torch.bfloat16 else 0.03
    assert (got.float() - want).norm() / want.norm() < near
    got.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lm.parameters())
    first = lm(tokens[:, :7])
    rest = lm(tokens[:, 7:], first.state).logits
    streamed = torch.cat([first.logits, rest], 1)
    assert (streamed - got).norm() / got.norm() < near / 4


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_far_positions_in_half_precision(positions: str) -> None:
    """bfloat16 has no whole numbers between 512 and 516; distances there are still distances."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        SIZES, mixers=("window",), n_layer=1, positions=positions, window=32
    )
    lm = LM(config).eval()
    tokens = torch.randint(3, 300, (1, 700))
    want = lm(tokens).logits[:, 600:]
    got = lm.bfloat16()(tokens).logits[:, 600:].float()
    assert (got - want).norm() / want.norm() < 0.02


def test_a_model_with_another_n_goes_on_as_it_was() -> None:
    lm = LM(SIZES)
    lm.checkpointing, lm.stretch = True, 8
    other = lm.with_entries(5)
    assert (other.checkpointing, other.stretch) == (True, 8)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(0, 3\); want \[B, T\], neither of them 0"):
        LM(SIZES)(torch.zeros(0, 3).long())
