"""Counted operations are those that torch sees, forward and backward, on every kind of model."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vqlm import flops, vq_schedule
from vqlm.bench_peers import own_model
from vqlm.config import MIXERS, LMConfig
from vqlm.model import LM

HEADS = LMConfig(
    vocab_size=31, n_layer=2, d_model=24, n_head=4, n_kv_head=2, d_k=16, d_v=16, d_ff=40,
    n_code=32, window=24, block=16, n_entry=32, chunk=16,
)  # fmt: skip
GATED = dataclasses.replace(HEADS, n_head=1, n_kv_head=None, d_v=48, layer="gau")
LENGTHS = (5, 16, 100, 257)


@pytest.fixture(autouse=True)
def every_code_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the count assumes: from the first that is."""
    order = vq_schedule._order

    def full(*arguments: Any) -> tuple[Any, list[int]]:  # code, kept, count, begins
        found, n_slot = order(*arguments)
        return found, [arguments[2].shape[2] if n else 0 for n in n_slot]

    monkeypatch.setattr(vq_schedule, "_order", full)


def seen(lm: LM, seq_len: int, step: bool = False) -> int:
    """What torch counts in a forward pass, or in one with its backward pass."""
    tokens = torch.randint(lm.config.vocab_size, (1, seq_len))
    if not step:
        return flops.counted_flops(lambda: lm(tokens))
    return flops.counted_flops(lambda: lm(tokens).objective(tokens, 1e-4).loss.backward())


@pytest.mark.parametrize("config", [HEADS, GATED], ids=["heads", "gated"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_count_is_torch_s(mixer: str, config: LMConfig) -> None:
    lm = LM(dataclasses.replace(config, mixers=(mixer,)))
    exact = mixer not in ("vq", "ovq")
    for n in LENGTHS:
        # Sums of counts, one column beside V, aren't counted as attention; they are multiplied.
        assert lm.flops(n) == pytest.approx(seen(lm, n), rel=0 if exact else 0.012)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": ("window", "vq"), "positions": "rotary"},
        {"mixers": ("vq",), "cache": False},
        {"mixers": ("vq",), "window": 10, "block": 33},
        {"mixers": ("ovq",), "growth": "eager", "n_entry": 50},
        {"mixers": ("ovq",), "growth": "eager", "n_entry": 50, "filing": "merge"},
        {"mixers": ("window",), "tie_embedding": True, "window": 40},
    ],
    ids=str,
)
def test_settings_that_decide_what_is_multiplied(changes: dict[str, Any]) -> None:
    lm = LM(dataclasses.replace(HEADS, **changes))
    assert lm.flops(150) == pytest.approx(seen(lm, 150), rel=0.012)


def test_shifted_keys_take_one_projection_of_one_token() -> None:
    lm = LM(dataclasses.replace(HEADS, mixers=("window", "softmax"), shifted_keys=True))
    assert lm.flops(60) == seen(lm, 60)


@pytest.mark.parametrize("mixer", ["vq", "ovq", "softmax"])
def test_a_training_step_is_three_forward_passes(mixer: str) -> None:
    """Or a little more, where the backward pass computes something again."""
    lm = LM(dataclasses.replace(HEADS, mixers=(mixer,), vocab_size=200, d_model=64))
    assert 0.97 < seen(lm, 300, step=True) / (flops.TRAINING * lm.flops(300)) < 1.1


def test_causal_attention_counts_the_visible_pairs() -> None:
    config = dataclasses.replace(HEADS, n_kv_head=None)
    query, key, value = torch.randn(3, 1, 4, 50, 16)
    found = flops.counted_flops(
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)
    )
    pairs = sum(range(51))
    assert found == flops.attention_flops(config, "sdpa", 50) == 2 * 4 * pairs * (16 + 16)
    all_pairs = flops.counted_flops(lambda: F.scaled_dot_product_attention(query, key, value))
    assert all_pairs == 2 * 4 * 50 * 50 * 32


def test_growth_with_the_length_is_linear_but_for_softmax() -> None:
    for mixer, least, most in (("vq", 3.9, 4.2), ("ovq", 3.9, 4.3), ("softmax", 8, 16)):
        config = dataclasses.replace(HEADS, mixers=(mixer,))
        growth = flops.model_flops(config, 40_000) / flops.model_flops(config, 10_000)
        assert least < growth < most


def test_the_sdpa_model_has_the_operations_of_its_formula() -> None:
    config = dataclasses.replace(HEADS, n_kv_head=None)
    lm = own_model("sdpa", config)
    rotary = dataclasses.replace(config, positions="rotary")
    want = 2 * flops.layer_flops(rotary, "sdpa", 90) + 2 * 90 * 24 * 31
    assert seen(lm, 90) == want


def test_slots_not_yet_in_use_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(dataclasses.replace(HEADS, mixers=("vq",), n_code=512))
    every = seen(lm, 100)
    monkeypatch.undo()
    assert seen(lm, 100) < 0.9 * every
