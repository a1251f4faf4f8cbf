"""Decoding one token at a time without gradients: what is made once, and what it may not change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vqlm.codebook import _lowest_argmax
from vqlm.config import LMConfig
from vqlm.kept import frozen
from vqlm.model import LM

EXACT = {"rtol": 0.0, "atol": 1e-10}
HEADS = [
    dict(n_head=1, layer="gau"), dict(n_head=4, n_kv_head=1), dict(n_head=4, n_kv_head=2),
    dict(n_head=3, n_kv_head=3),
]  # fmt: skip


def model(mixers: str = "vq", dtype: torch.dtype = torch.float64, **changes: object) -> LM:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, d_model=24, n_head=3, d_k=8, d_v=5, n_code=11, window=5, block=7)
    sizes |= {"vocab_size": 23, "mixers": (mixers,)} | changes
    lm = LM(LMConfig(**sizes)).to(dtype).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # biases start at zero, which would hide them
        for name, parameter in lm.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return lm


@given(
    heads=st.sampled_from(HEADS), cache=st.booleans(), window=st.integers(1, 9),
    n_code=st.integers(1, 13), lengths=st.lists(st.integers(0, 23), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_single_tokens_equal_one_call(
    heads: dict[str, object], cache: bool, window: int, n_code: int, lengths: list[int], seed: int
) -> None:
    """From warm states of unequal lengths, one of them perhaps empty; states after it, too."""
    lm = model(**heads, cache=cache, window=window, n_code=n_code)
    torch.manual_seed(seed)
    prompt, rest = torch.randint(23, (2, 24)), torch.randint(23, (2, 19))
    mask = torch.arange(24) <= torch.tensor(lengths)[:, None]
    with torch.no_grad():
        warm = lm(prompt, mask=mask).state
        before = copy.deepcopy(warm)
        want = lm(rest, warm)
        state, logits = warm, []
        for token in rest.split(1, 1):
            out = lm(token, state)
            state, logits = out.state, [*logits, out.logits]
    assert_close(torch.cat(logits, 1), want.logits, **EXACT)
    for got, wanted in zip(state.tensors(), want.state.tensors(), strict=True):
        assert_close(got, wanted, **EXACT)
        assert got.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(warm.tensors(), before.tensors(), strict=True))


def test_scores_beyond_the_range_of_exp() -> None:
    lm = model(dtype=torch.float32)
    with torch.no_grad():
        for layer in lm.layers:
            layer.mixer.project.content_bias.mul_(1000)  # type: ignore[union-attr, operator]
        tokens, state = torch.randint(23, (2, 30)), None
        want = lm(tokens).logits
        for token in tokens.split(1, 1):
            out = lm(token, state)
            state = out.state
    assert_close(out.logits, want[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixers", ["vq", "softmax", "window"])
def test_what_is_frozen_is_made_once_and_follows_a_change(
    mixers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, tokens, made = model(mixers), torch.randint(23, (1, 4)), []
    project = type(lm.layers[0].mixer.project)  # type: ignore[union-attr]
    make = project._bias
    monkeypatch.setattr(project, "_bias", lambda self, seed: made.append(1) or make(self, seed))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return lm(tokens).logits

    want = logits()
    assert len(made) == 2
    with frozen(lm):
        assert all(torch.equal(logits(), want) for _ in range(3))
        assert len(made) == 4
        with frozen(lm):  # a second user who leaves first
            logits()
        assert len(made) == 4
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.1)
            for buffer in lm.buffers():
                buffer.mul_(1.5)
        changed = logits()
        assert len(made) == 6
    assert not torch.equal(changed, want)
    assert torch.equal(changed, logits())
    assert len(made) == 8


def test_frozen_models_train_and_travel() -> None:
    """Gradients reach what is kept, and a copy, or a pickle for another process, keeps nothing."""
    lm, tokens = model(), torch.randint(23, (1, 9))
    with frozen(lm):
        with torch.inference_mode():
            lm(tokens)
        lm(tokens).logits.sum().backward()
        weight = lm.layers[0].mixer.project.position.weight  # type: ignore[union-attr]
        assert weight.grad is not None and weight.grad.abs().sum() > 0  # type: ignore[union-attr]
        twin = copy.deepcopy(lm)
    made: list[int] = []
    twin.layers[0].mixer.codebook.kept.get(lambda: made.append(1))  # type: ignore[union-attr]
    twin.layers[0].mixer.codebook.kept.get(lambda: made.append(1))  # type: ignore[union-attr]
    assert len(made) == 2


@given(
    n_code=st.sampled_from([1, 7, 32, 64, 96, 97, 128, 512]), levels=st.integers(1, 400),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_places_of_maxima_are_the_lowest(n_code: int, levels: int, seed: int) -> None:
    """With few ``levels`` most maxima are tied."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, 5, n_code), generator=generator).double()
    want = [[row.tolist().index(max(row.tolist())) for row in head] for head in scores]
    assert _lowest_argmax(scores).tolist() == want
