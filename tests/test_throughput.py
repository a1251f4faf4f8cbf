"""The throughput table: what is timed is right, and is timed once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spoilt import not_a_number, wrong_gradient, wrong_output
from torch.testing import assert_close

from vqlm import throughput
from vqlm.config import LMConfig
from vqlm.throughput import ATTENTIONS, HEADS, VQ, Layers, config_of

TINY = LMConfig(d_model=8, n_head=2, d_k=4, d_v=6, n_code=5, window=3, block=4)


def test_head_types() -> None:
    single, multi_query, multi_head = (config_of(TINY, heads) for heads in HEADS)
    assert single.gated and (single.n_head, single.kv_heads, single.d_v) == (1, 1, 16)
    assert (multi_query.n_head, multi_query.kv_heads, multi_query.d_v) == (2, 1, 6)
    assert (multi_head.n_head, multi_head.kv_heads, multi_head.d_v) == (2, 2, 6)
    assert not multi_query.gated and not multi_head.gated


@pytest.mark.parametrize("heads", HEADS)
def test_what_is_timed_is_the_layer_of_the_model(heads: str) -> None:
    """All VQ kinds are ``VQAttention``, quadratic is ``SoftmaxAttention``; and they differ."""
    layers = Layers(config_of(TINY, heads), (1, 11), torch.float64)
    want, _, aux = layers.vq(layers.x)
    for attention in VQ:
        out, commitment = layers.forward(attention)
        assert_close((out, commitment), (want, aux.commitment), atol=1e-10, rtol=1e-10)
    quadratic, nothing = layers.forward("quadratic")
    assert_close(quadratic, layers.softmax(layers.x)[0])
    assert nothing == 0 and not torch.allclose(quadratic, want)


def test_each_reduction_is_timed_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results are equal, so only the call can tell them apart."""
    right, asked = throughput.vq_attention_parallel, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["reduction"])
        return right(*args, **kwargs)

    monkeypatch.setattr(throughput, "vq_attention_parallel", noted)
    layers = Layers(config_of(TINY, "mha"), (1, 11), torch.float32)
    for attention in ATTENTIONS:
        layers.forward(attention)
    assert asked == ["matmul", "scan"]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_step_gives_every_parameter_a_gradient(attention: str) -> None:
    layers = Layers(config_of(TINY, "shga"), (1, 11), torch.float32)
    _, *gradients = layers.step(attention)
    mixer = layers.softmax if attention == "quadratic" else layers.vq
    assert len(gradients) == 1 + len(list(mixer.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_kinds_of_vq_attention_are_equal() -> None:
    assert 0 < throughput.check_equivalence() < 1e-9


@pytest.mark.parametrize("spoil", [wrong_output, wrong_gradient, not_a_number])
def test_a_wrong_attention_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[..., Any]
) -> None:
    right = throughput.vq_attention_parallel
    monkeypatch.setattr(throughput, "vq_attention_parallel", spoil(right))
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("timed a wrong attention"))
    with pytest.raises(RuntimeError, match="differs from the serial loop"):
        throughput.table(tmp_path / "a.json", TINY, [8])


def test_every_repetition_of_every_kind_is_timed_in_turn() -> None:
    ticks = iter(range(100))
    seconds = throughput.measure(TINY, 8, ("quadratic", "scan"), 3, lambda: float(next(ticks)))
    assert seconds == {"quadratic": [1.0] * 3, "scan": [1.0] * 3}


def test_ratios_and_quartiles_by_hand() -> None:
    row = throughput.row_of(
        {"quadratic": [8.0, 6.0, 6.0], "serial": [2.0, 3.0, 1.0], "scan": [4.0, 1.0, 1.0]}, 1000
    )
    assert row["us_per_token"]["serial"] == [1500, 2000, 2500]
    assert row["quadratic_over"] == {"serial": 4.0, "scan": 6.0}  # of 4 2 6, and of 2 6 6
    assert row["serial_over"] == {"scan": 1.0}  # of 1/2 3 1
    alone = throughput.row_of({"serial": [2.0]}, 1000)
    assert alone["us_per_token"]["serial"] == [2000] * 3
    assert alone["quadratic_over"] == {} and alone["serial_over"] == {}


def test_table_measures_once_and_again_what_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, told = tmp_path / "new" / "a.json", []
    asked: list[tuple[str, int, tuple[str, ...]]] = []
    measure = throughput.measure

    def noted(config: LMConfig, seq_len: int, attentions: tuple[str, ...], *rest: Any) -> Any:
        heads = next(h for h in HEADS if config_of(TINY, h) == config)
        asked.append((heads, seq_len, tuple(attentions)))
        return measure(config, seq_len, attentions, *rest)

    monkeypatch.setattr(throughput, "measure", noted)
    settings = {"repeats": 2, "clock": "cpu"}
    rows = throughput.table(path, TINY, [12, 8], quadratic_limit=8, report=told.append, **settings)
    assert asked == [(h, n, ATTENTIONS if n == 8 else VQ) for h in HEADS for n in (8, 12)]
    assert [(row["heads"], row["seq_len"]) for row in rows] == [a[:2] for a in asked]
    assert rows == told == json.loads(path.read_bytes())["rows"]
    assert "quadratic" not in rows[1]["us_per_token"] and rows[1]["quadratic_over"] == {}
    for row in rows:
        for low, middle, high in row["us_per_token"].values():
            assert 0 < low <= middle <= high

    asked.clear()
    assert throughput.table(path, TINY, [8], quadratic_limit=8, **settings) == rows[::2]
    assert asked == []
    throughput.table(path, TINY, [8, 12], quadratic_limit=12, **settings)
    assert asked == [(h, 12, ATTENTIONS) for h in HEADS]
    assert len(json.loads(path.read_bytes())["rows"]) == 6


def test_a_row_is_kept_when_the_next_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure, calls = throughput.measure, []

    def stopped(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(throughput, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        throughput.table(tmp_path / "a.json", TINY, [8], repeats=1)
    assert [r["heads"] for r in json.loads((tmp_path / "a.json").read_bytes())["rows"]] == ["shga"]
    throughput.table(tmp_path / "a.json", TINY, [8], repeats=1)
    assert len(calls) == 4


@pytest.mark.parametrize(("lengths", "repeats"), [([], 1), ([0], 1), ([8], 0)])
def test_nothing_to_time_is_refused(tmp_path: Path, lengths: list[int], repeats: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        throughput.table(tmp_path / "a.json", TINY, lengths, repeats=repeats)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', '{"rows": [{}]}'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a throughput table"):
        throughput.table(path, TINY, [8], repeats=1)
    assert path.read_text() == content


def test_lines_stand_under_their_headings() -> None:
    fast = {name: [1.0, 2.0, 3.0] for name in ATTENTIONS}
    over = {name: 4.0 for name in VQ}
    row = {"heads": "mha", "seq_len": 8, "us_per_token": fast, "quadratic_over": over}
    short = {
        **row, "us_per_token": {name: fast[name] for name in VQ}, "quadratic_over": {},
    }  # fmt: skip
    heading = throughput.header().splitlines()[1]
    assert len(heading) == len(throughput.line(row)) == len(throughput.line(short))
    assert throughput.line(row).split() == ["mha", "8", *["2.0"] * 4, *["4.00"] * 3]
    assert throughput.line(short).split() == ["mha", "8", "-", *["2.0"] * 3, *["-"] * 3]
