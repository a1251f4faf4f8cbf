"""The cost model: its bytes are those that are counted, and its page shows what it predicts."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from vqlm.config import LMConfig
from vqlm.flops import model_flops
from vqlm.model import LM
from vqlm.scaling import Machine, cut_traffic, main, shared_bytes, step_seconds, table

PAGE = (Path(__file__).parents[1] / "docs/scaling.md").read_text(encoding="utf-8")
PAPER = LMConfig(
    n_layer=24, d_model=2048, n_head=16, d_k=128, d_v=128, n_code=512, window=512, block=512
)


def test_the_page_shows_what_the_model_predicts() -> None:
    ranks = [1, 2, 4, 8, 16, 64, 256, 1024]
    for line in table(dataclasses.replace(PAPER, n_kv_head=None), 1 << 20, ranks, Machine()).split(
        "\n"
    ):
        assert line in PAGE
    assert "4,784,216 | 4,784,216" in PAGE


def test_one_process_sends_nothing() -> None:
    assert cut_traffic(PAPER, 4, 1).total == shared_bytes(PAPER, 1) == 0
    found = step_seconds(PAPER, 1 << 20, 4, 1, 1, Machine(speed=1e12))
    assert found["cut"] == found["shared"] == 0
    assert found["compute"] == pytest.approx(12 * model_flops(PAPER, 1 << 20) / 1e12)


def test_what_is_shared_is_gradients_and_statistics() -> None:
    """By hand: a ring of 2 sends half of everything twice."""
    config = dataclasses.replace(tiny.MODEL, mixers=("window",))
    n_parameter = sum(p.numel() for p in LM(config).parameters())
    assert shared_bytes(config, 2) == (2 * n_parameter + 2) * 4 // 2
    assert shared_bytes(config, 2, sharded=True) == (3 * n_parameter + 2) * 4 // 2
    assert shared_bytes(tiny.MODEL, 2) > shared_bytes(config, 2)


def test_a_dictionary_waits_for_the_part_before() -> None:
    vq, ovq = (dataclasses.replace(PAPER, mixers=(kind,)) for kind in ("vq", "ovq"))
    parts = 8
    for config, factor in ((vq, 1.0), (ovq, (24 + parts - 1) / 24)):
        whole = step_seconds(config, 1 << 16, 1, 1, 1, Machine())["compute"]
        assert step_seconds(config, 1 << 16, 1, parts, 1, Machine())["compute"] == pytest.approx(
            whole * factor / parts
        )


def test_rows_and_tokens_must_divide() -> None:
    with pytest.raises(ValueError, match="3 rows on 2 processes"):
        step_seconds(PAPER, 1 << 16, 3, 1, 2, Machine())


def test_words_and_options_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    main("predict --tokens 4096 n_layer=2 d_model=16 --ranks 1,4 n_head=2".split())
    small = LMConfig(n_layer=2, d_model=16, n_head=2, n_code=256, window=64, block=64)
    assert capsys.readouterr().out == table(small, 4096, [1, 4], Machine()) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bogus", "got 'bogus'; settings are written as key=value"),
        ("n_layers=2", "did you mean 'n_layer'"),
        ("--ranks 1,x", "'1,x' is not numbers with commas between"),
        ("--ranks 0", "in 0 parts; both must divide"),
        ("--rank", "expected one argument"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", *words.split()])
    assert message in capsys.readouterr().err.splitlines()[-1]
