"""Official names there and back; what does not fit is named.  Numbers: tests/test_official.py."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from vqlm.config import LMConfig
from vqlm.convert import (
    config_from_official,
    from_official,
    infer_settings,
    state_to_official,
    to_official,
)
from vqlm.model import LM

SETTINGS: dict[str, Any] = dict(
    n_layer=2, n_vocab=13, d_model=10, d_k=3, d_v=7, n_head=2, n_code=5, block_len=4, mem_len=6,
    agg_cache=1, grad_thru_cache=1, pe_abs=0, pe_lam=1e4, e_tie=0, e_preln=0, e_scale=0.5,
    p_droplyr=0.25, lr_max=0.1,
)  # fmt: skip
OTHER = SETTINGS | dict(pe_abs=1, e_tie=1, e_preln=1, n_head=1)


def params(settings: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random values, also where a fresh model has zeros or ones."""
    arrays = to_official(LM(config_from_official(settings)))
    random = np.random.default_rng(seed)
    return {n: random.normal(size=x.shape).astype(np.float32) for n, x in arrays.items()}


def test_settings_arrive() -> None:
    config = config_from_official(json.dumps(SETTINGS))
    assert config == LMConfig(
        vocab_size=13, n_layer=4, d_model=10, n_head=2, d_k=3, d_v=7, n_code=5, window=6, block=4,
        layer="gau", tie_embedding=False, output_scale=0.5, final_norm=False, position_base=1e4,
        dropout_layer=0.25,
    )  # fmt: skip
    assert type(config.cache) is bool


@pytest.mark.parametrize("name", ["mem_len", "e_scale", "n_layer", "pe_lam"])
def test_a_missing_setting_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"no '{name}'"):
        config_from_official({k: v for k, v in SETTINGS.items() if k != name})


@pytest.mark.parametrize("settings", [SETTINGS, OTHER])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back_is_bit_exact(settings: dict[str, Any], dtype: Any) -> None:
    want = {name: x.astype(dtype) for name, x in params(settings).items()}
    got = to_official(from_official(want, settings))
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == dtype and x.flags.c_contiguous
        assert np.array_equal(x, want[name]), name


def test_parameters_are_copied() -> None:
    given = params(SETTINGS)
    lm = from_official(given, SETTINGS)
    before = lm.layers[0].mixer.project.query.weight.clone()
    for x in given.values():
        x.fill(0)
    assert torch.equal(lm.layers[0].mixer.project.query.weight, before)
    to_official(lm)["token_embedder/embs"].fill(7)
    assert not (lm.embedding.weight == 7).any()


def test_kernels_are_turned_and_head_biases_cut() -> None:
    given = params(SETTINGS)
    lm = from_official(given, SETTINGS)
    path = "transformer_layers_1/scanned_attn1/"
    mixer = lm.layers[2].mixer
    x = torch.randn(10)
    want = x.numpy() @ given[path + "kvg_proj/kernel"]
    np.testing.assert_allclose(mixer.project.key_value_gate(x).detach(), want, atol=1e-5)
    assert torch.equal(mixer.project.position_bias, torch.tensor(given[path + "v"]).reshape(2, 3))


@pytest.mark.parametrize("settings", [SETTINGS, OTHER])
def test_settings_can_be_inferred_from_shapes(settings: dict[str, Any]) -> None:
    found = infer_settings(params(settings))
    assert found == {name: settings[name] for name in found}
    assert len(found) == 10


@pytest.mark.parametrize(
    "name",
    ["token_embedder/embs", "out_proj/bias", "transformer_layers_1/scanned_attn2/quantizer/c_sum"],
)
def test_a_missing_parameter_is_named(name: str) -> None:
    given = params(SETTINGS)
    del given[name]
    with pytest.raises(ValueError, match=f"^{name} is missing"):
        from_official(given, SETTINGS)


def test_a_parameter_left_over_is_named() -> None:
    given = params(SETTINGS) | {"transformer_layers_2/scanned_attn1/u": np.zeros(6)}
    with pytest.raises(ValueError, match="^transformer_layers_2/scanned_attn1/u is left over"):
        from_official(given, SETTINGS)


def test_a_wrong_shape_is_named() -> None:
    given = params(SETTINGS)
    name = "transformer_layers_0/scanned_attn1/q_proj/kernel"
    given[name] = given[name].T
    with pytest.raises(ValueError, match=rf"{name} has shape \(6, 10\).*wants \(10, 6\)"):
        from_official(given, SETTINGS)


def test_the_unused_bias_may_be_absent_and_has_no_gradient() -> None:
    given = params(SETTINGS)
    lm = from_official(given, SETTINGS)
    lm(torch.randint(13, (1, 5))).logits.sum().backward()
    assert not to_official(lm, grads=True)["token_embedder/bias_out"].any()
    del given["token_embedder/bias_out"]
    back = to_official(from_official(given, SETTINGS))
    assert not back["token_embedder/bias_out"].any()


def test_gradients_without_statistics_leave_codebooks_out() -> None:
    lm = from_official(params(SETTINGS), SETTINGS)
    lm(torch.randint(13, (1, 5))).logits.square().sum().backward()
    arrays = to_official(lm, grads=True)
    assert arrays.keys() == {n for n in params(SETTINGS) if "quantizer" not in n}
    used = [name for name, x in arrays.items() if x.any()]
    assert set(arrays) - set(used) == {"token_embedder/bias_out"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(mixers=("softmax",)), "mixers"),
        (dict(layer="swiglu"), "layer"),
        (dict(n_layer=3), "n_layer"),
        (dict(n_kv_head=1), "n_kv_head"),
    ],
)
def test_what_the_official_model_cannot_be_is_refused(change: dict[str, Any], word: str) -> None:
    config = dataclasses.replace(config_from_official(SETTINGS), **change)
    with pytest.raises(ValueError, match=word):
        to_official(LM(config))


def test_empty_slots_of_a_state_are_empty_there() -> None:
    lm = from_official(params(SETTINGS), SETTINGS)
    with torch.no_grad():
        state = lm(torch.randint(13, (2, 4))).state
    arrays = state_to_official(state)
    assert arrays["layer1/attn2/pos_offset"] == 4
    z = arrays["layer0/attn1/xlcache/z"]
    assert (z[..., :2] == 5).all() and (z[..., 2:] < 5).all()
    assert not arrays["layer0/attn1/xlcache/v"][:, :, :2].any()
    assert arrays["layer0/attn1/xlcache/k_hat"][:, :, 2:].all()
    assert not arrays["layer0/attn1/aggcache/lower"].any()


def test_rows_of_unequal_length_have_no_official_state() -> None:
    lm = from_official(params(SETTINGS), SETTINGS)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    with pytest.raises(ValueError, match="one by one"):
        state_to_official(lm(torch.randint(13, (2, 3)), mask=mask).state)
