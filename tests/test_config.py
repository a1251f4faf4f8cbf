"""The config refuses what can't work, and says which field; overrides and JSON keep the types."""

import dataclasses
import json
from typing import Any

import pytest

from vqlm.config import LMConfig, TrainConfig, from_dict, override


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        *[({name: 0}, [name]) for name in (
            "vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "d_k", "d_v", "d_ff",
            "n_code", "window", "block",
        )],
        *[({f"dropout_{kind}": p}, [f"dropout_{kind}"])
          for kind in ("embedding", "sinusoid", "residual", "layer")
          for p in (-0.1, 1.0, float("nan"))],
        ({"d_model": 33}, ["d_model", "33", "even"]),
        ({"n_head": 8, "n_kv_head": 3}, ["n_kv_head=3", "n_head=8"]),
        ({"n_head": 2, "n_kv_head": 4}, ["n_kv_head=4", "n_head=2"]),
        ({"mixers": ()}, ["mixers"]),
        ({"mixers": ("vq", "windw")}, ["mixer", "'windw'", "'window'"]),
        ({"mixers": ("softmaxx",)}, ["mixer", "'softmax'"]),
        ({"layer": "swigl"}, ["layer", "'swiglu'"]),
        ({"position_base": 0.0}, ["position_base"]),
        ({"block": 10**400}, ["block=", "at most 2^53"]),
        ({"growth_span": 2**53 + 1}, ["growth_span=", "at most 2^53"]),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        LMConfig(**changes)
    assert all(name in str(error.value) for name in names)


def test_no_number_of_a_training_is_too_large_for_arithmetic() -> None:
    assert TrainConfig(steps=2**53).steps == 2**53
    with pytest.raises(ValueError, match=r"TrainConfig: steps=1000.*at most 2\^53"):
        TrainConfig(steps=10**400)


def test_defaults_are_filled_in() -> None:
    config = LMConfig(d_model=512, n_head=6, mixers=("window", "vq"), layer="gau")
    assert (config.kv_heads, config.ff_width, config.gated) == (6, 1408, True)
    assert [config.mixer_of(i) for i in range(3)] == ["window", "vq", "window"]
    assert dataclasses.replace(config, n_kv_head=2, d_ff=96).kv_heads == 2
    assert dataclasses.replace(config, n_kv_head=2, d_ff=96).ff_width == 96


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("d_model=256", 256), ("d_model=1e3", 1000), ("dropout_layer=0", 0.0),
        ("dropout_layer=1e-2", 0.01), ("cache=false", False), ("cache=True", True),
        ("d_ff=none", None), ("d_ff=64", 64), ("layer=gau", "gau"), ("mixers=vq", ("vq",)),
        ("mixers=window, vq", ("window", "vq")),
    ],
)  # fmt: skip
def test_texts_become_the_fields_types(text: str, want: Any) -> None:
    name, _, value = text.partition("=")
    base = LMConfig()
    got = override(base, {name: value})
    assert getattr(got, name) == want and type(getattr(got, name)) is type(want)
    assert dataclasses.replace(got, **{name: getattr(base, name)}) == base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_model=wide", "d_model='wide' is not of type int"),
        ("d_model=2.5", "d_model='2.5' is not of type int"),
        ("d_model=1e999", "d_model='1e999' is not of type int"),
        ("d_model=none", "d_model='none' is not of type int"),
        ("d_model=", "d_model='' is not of type int"),
        ("d_model=True", "d_model='True' is not of type int"),
        ("dropout_layer=half", "dropout_layer='half' is not of type float"),
        ("cache=1", "cache='1' is not of type bool"),
        ("d_ff=wide", "d_ff='wide' is not of type int or none"),
        ("n_layers=3", "unknown setting 'n_layers'; did you mean 'n_layer'"),
        ("d_model=7", "d_model=7"),
        ("mixers=", "mixers"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    name, _, value = text.partition("=")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        override(LMConfig(), {name: value})


def test_a_config_survives_json() -> None:
    config = LMConfig(mixers=("window", "vq"), d_ff=None, n_kv_head=2, dropout_layer=0.25)
    assert from_dict(LMConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert from_dict(LMConfig, {"output_scale": 2}).output_scale == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windw": 3}, "unknown key of LMConfig 'windw'; did you mean 'window'"),
        ({"window": "3"}, "window='3' is not of type int"),
        ({"window": True}, "window=True is not of type int"),
        ({"n_layer": 2.5}, "n_layer=2.5 is not of type int"),
        ({"n_layer": None}, "n_layer=None is not of type int"),
        ({"d_ff": "64"}, "d_ff='64' is not of type int or none"),
        ({"mixers": "vq"}, "mixers='vq' is not of type tuple"),
        ({"output_scale": "1"}, "output_scale='1' is not of type float"),
        ({"output_scale": 10**400}, "output_scale has 401 digits, too many for a float"),
        ({"mixers": [1, 2]}, r"mixers=\(1, 2\) is not of type tuple"),
    ],
)
def test_a_dictionary_with_mistakes_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(LMConfig, values)
