"""Choosing tokens, and generating: the same as running the whole model again for every token."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.model import LM
from vqlm.sampling import nucleus, pick

VOCAB = 13


@pytest.fixture(scope="module", params=["vq", "softmax", "window"])
def lm(request: pytest.FixtureRequest) -> LM:
    torch.manual_seed(0)
    config = LMConfig(
        vocab_size=VOCAB, n_layer=2, d_model=8, n_head=2, d_k=5, d_v=7, d_ff=8, n_code=5, window=3,
        block=4, mixers=(request.param,), absolute_position=True, dropout_residual=0.5,
    )  # fmt: skip
    model = LM(config).double().train()
    with torch.no_grad():
        model.position_scale.fill_(0.5)
    return model


def greedy_by_hand(lm: LM, prompt: list[int], n_token: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n_token):
            tokens.append(int(lm.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
    lm.train()
    return tokens


def test_greedy_generation_is_the_argmax_of_full_passes(lm: LM) -> None:
    prompt = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
    got = lm.generate(prompt, 10, temperature=0.0)
    assert got[0].tolist() == greedy_by_hand(lm, prompt[0].tolist(), 10)
    assert torch.equal(lm.generate(prompt, 0, temperature=0.0), prompt)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_prompts_generate_what_they_would_alone(lm: LM, side: str) -> None:
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5]]
    tokens, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        at = {"left": range(7 - n, 7), "right": range(n), "middle": range(0, 2 * n, 2)}[side]
        at = list(at) if n < 7 else list(range(7))
        tokens[row, at], mask[row, at] = torch.tensor(prompt), True
    got = lm.generate(tokens, 5, temperature=0.0, mask=mask)
    assert torch.equal(got[:, :7], tokens)
    for row, prompt in enumerate(prompts):
        assert got[row, 7:].tolist() == greedy_by_hand(lm, prompt, 5)[len(prompt) :]


def test_the_state_yielded_goes_on_where_it_stopped(lm: LM) -> None:
    prompt = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    whole = lm.generate(prompt, 8, temperature=0.0)
    *_, (token, state) = lm.stream(prompt, 3, temperature=0.0)
    rest = lm.generate(token[:, None], 5, temperature=0.0, state=state)
    assert torch.equal(rest, whole[:, 6:])


def test_a_seed_decides_the_sample(lm: LM) -> None:
    prompt = torch.tensor([[1, 2], [3, 4]])

    def draw(seed: int) -> Tensor:
        return lm.generate(prompt, 8, top_p=0.9, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_streaming_leaves_the_callers_modes_alone(lm: LM) -> None:
    """Inference mode ends at each yield, training mode comes back, also when stopped early."""
    prompt = torch.tensor([[1, 2, 3]])
    stream = lm.stream(prompt, 5)
    for index, (token, _) in enumerate(stream):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight = torch.ones(1, requires_grad=True)
        assert (weight * 2).requires_grad
        assert token.shape == (1,)
        if index == 2:
            break
    stream.close()
    assert lm.training and not torch.is_inference_mode_enabled()
    weight = torch.ones(VOCAB, requires_grad=True)
    weight[lm.generate(prompt, 2)].sum().backward()  # what comes back can be used in training


def test_each_module_is_evaluated_and_then_as_it_was(lm: LM) -> None:
    lm.layers[0].eval()
    modes = [module.training for module in lm.modules()]
    assert any(modes) and not all(modes)
    seen = []
    lm.norm.register_forward_hook(lambda *_: seen.append(any(m.training for m in lm.modules())))
    lm.generate(torch.tensor([[1, 2]]), 2)
    assert seen == [False, False] and [module.training for module in lm.modules()] == modes


def test_two_streams_of_a_model_in_training_do_not_end_each_other_s_modes(lm: LM) -> None:
    """With dropout, tokens of the one that goes on would be others."""
    lm.config = dataclasses.replace(lm.config, dropout_embedding=0.5)
    prompt = torch.tensor([[1, 2, 3]])
    alone = [int(token) for token, _ in lm.stream(prompt, 6, temperature=0.0)]
    first, second = (lm.stream(prompt, n, temperature=0.0) for n in (2, 6))
    found = []
    for token, _ in second:
        found.append(int(token))
        assert lm.training
        next(first, None)
    assert found == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(top_p=float("nan")), "top_p=nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pick(torch.zeros(1, 3), **settings)


def test_an_empty_prompt_is_refused(lm: LM) -> None:
    with pytest.raises(ValueError, match="neither of them 0"):
        lm.generate(torch.zeros(1, 0, dtype=torch.long), 3)


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.floats(0.01, 1), st.randoms()
)  # fmt: skip
def test_nucleus_is_the_smallest_set_that_is_large_enough(
    weights: list[float], top_p: float, rng: Any
) -> None:
    probability = torch.tensor(weights, dtype=torch.float64)
    probability = probability / probability.sum()
    keep = nucleus(probability[None], top_p)[0]
    ranked = sorted(probability.tolist(), reverse=True)
    mass, size = 0.0, 0
    while size == 0 or (size < len(ranked) and mass < top_p - 1e-4):
        mass += ranked[size]
        size += 1
    kept = sorted(probability[keep].tolist(), reverse=True)
    assert kept == ranked[:size]  # ties may fall either way


def test_nucleus_at_the_slack_and_at_one() -> None:
    probability = torch.tensor([[0.3, 0.5, 0.2]]).double()
    for top_p, want in (
        (0.5, [0, 1, 0]), (0.5 + 9e-5, [0, 1, 0]), (0.5 + 2e-4, [1, 1, 0]), (1.0, [1, 1, 1]),
        (1e-5, [0, 1, 0]),
    ):  # fmt: skip
        assert nucleus(probability, top_p)[0].tolist() == [bool(x) for x in want]


def test_nucleus_agrees_with_the_official_rule(shared_data: Callable[[str], Path]) -> None:
    with np.load(shared_data("fixtures/official_a.npz"), allow_pickle=False) as official:
        probability = torch.from_numpy(official["out/logprobs"][:, -1]).exp()
        for p in ("0.5", "0.8", "0.9", "0.999"):
            want = torch.from_numpy(official[f"nucleus/keep_p{p}"]).bool()
            assert torch.equal(nucleus(probability, float(p)), want)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-30])
def test_the_least_temperatures_are_greedy_and_the_greatest_even(temperature: float) -> None:
    logits = torch.tensor([[3e38, 7.0, -torch.inf], [-2.0, -1.0, -torch.inf]])
    assert pick(logits, temperature).tolist() == [0, 1]
    drawn = pick(logits[1:].expand(100, -1), torch.inf, generator=torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [0, 1]


def test_frequencies_follow_temperature_and_nucleus() -> None:
    probability = torch.tensor([0.1, 0.6, 0.3])
    logits = (probability.log() + 5).expand(40_000, -1)
    rng = torch.Generator().manual_seed(0)

    def shares(**settings: Any) -> Tensor:
        drawn = pick(logits, generator=rng, **settings)
        return drawn.bincount(minlength=3) / len(drawn)

    close = {"atol": 0.015, "rtol": 0}
    assert_close(shares(), probability, **close)
    squared = probability.square() / probability.square().sum()
    assert_close(shares(temperature=0.5), squared, **close)
    assert_close(shares(top_p=0.7), torch.tensor([0, 2 / 3, 1 / 3]), **close)
    assert shares(temperature=0.0).tolist() == [0, 1, 0]
    # The nucleus is taken after the temperature: squared, the top token alone has 0.78.
    assert shares(temperature=0.5, top_p=0.75).tolist() == [0, 1, 0]
