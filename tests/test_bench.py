"""The benchmark: its rows, its refusal to time a wrong attention, its picture, its JSON."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vqlm import bench
from vqlm.config import LMConfig

TINY = LMConfig(n_head=2, d_k=4, d_v=4, n_code=5, window=3, block=4)


def test_rows_have_every_length_pass_and_mixer_up_to_the_quadratic_limit() -> None:
    reported: list[bench.Row] = []
    rows = bench.attention_rows(TINY, [8, 16], max_quadratic=8, repeats=3, report=reported.append)
    assert reported == rows
    both = ["forward", "forward+backward"]
    want = [(8, p, m) for p in both for m in ("vq", "sdpa")] + [(16, p, "vq") for p in both]
    assert [(row.seq_len, row.pass_, row.mixer) for row in rows] == want
    for row in rows:
        assert row.what == "attention"
        low, high = row.us_per_token_spread
        assert 0 < low <= row.us_per_token_median <= high
        other = {"vq": "sdpa", "sdpa": "vq"}[row.mixer]
        assert list(row.ratio_vs) == ([other] if row.seq_len == 8 else [])
        assert all(ratio > 0 for ratio in row.ratio_vs.values())


def test_ratio_is_above_one_where_this_mixer_is_faster() -> None:
    seconds = {"vq": [(1.0, 2.0), (1.0, 2.0)], "sdpa": [(3.0, 8.0), (5.0, 8.0)]}
    rows = {(r.mixer, r.pass_): r for r in bench._summarise(seconds, seq_len=1000)}
    assert rows["vq", "forward"].ratio_vs == {"sdpa": 4.0}
    assert rows["sdpa", "forward+backward"].ratio_vs == {"vq": 0.25}
    assert rows["sdpa", "forward"].us_per_token_median == 4000
    assert rows["sdpa", "forward"].us_per_token_spread == (3500, 4500)


def test_one_repeat_has_no_spread() -> None:
    (row, _) = bench._summarise({"vq": [(1.0, 2.0)]}, seq_len=1000)
    assert row.us_per_token_spread == (1000, 1000)


def test_both_mixers_give_gradients_to_all_they_are_timed_for() -> None:
    """Grouped heads included, and both of them from the same inputs."""
    config = dataclasses.replace(TINY, n_head=4, n_kv_head=2)
    x = bench._Inputs.of(config, 11, torch.float32, seed=0)
    for mixer, run in bench._RUN.items():
        out = run(x)
        assert out.shape == x.d_out.shape
        for gradient in torch.autograd.grad(out, x.leaves(mixer), x.d_out):
            assert gradient.abs().sum() > 0


def test_equivalence_check_passes() -> None:
    assert bench.check_equivalence() < 1e-9


def _wrong_output(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, state = attention(*args, **kwargs)
        return out * (1 + 1e-6), state

    return wrong


def _wrong_gradient(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **kwargs, cache_grad=False)

    return wrong


def _not_a_number(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, state = attention(*args, **kwargs)
        return out * float("nan"), state

    return wrong


@pytest.mark.parametrize("spoil", [_wrong_output, _wrong_gradient, _not_a_number])
def test_a_wrong_attention_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any]
) -> None:
    monkeypatch.setattr(bench.vq, "vq_attention", spoil(bench.vq.vq_attention))
    monkeypatch.setattr(bench, "_time", lambda *_: pytest.fail("timed a wrong attention"))
    with pytest.raises(RuntimeError, match="differs from its quadratic oracle"):
        bench.attention_rows(TINY, [8])


@pytest.mark.parametrize(("lengths", "repeats"), [([], 1), ([0], 1), ([8], 0)])
def test_nothing_to_time_is_refused(lengths: list[int], repeats: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        bench.attention_rows(TINY, lengths, repeats=repeats)


def _rows() -> list[bench.Row]:
    return [
        bench.Row("attention", mixer, n, p, 10.0, (9.0, 12.0), {})
        for n in (512, 1024, 65536)
        for p in bench.PASSES
        for mixer in ("vq", "sdpa")
        if mixer == "vq" or n < 2048
    ]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_plot_writes_a_file_and_the_same_one_again(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    bench.plot(_rows(), path, "eight heads")
    first = path.read_bytes()
    assert first.startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[path.suffix])
    bench.plot(_rows(), path, "eight heads")
    assert path.read_bytes() == first


def test_run_returns_all_that_it_measured() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = "attention --lengths 64 32 --max-quadratic 32 --repeats 2 --threads 1 --clock cpu"
    result = bench.run(parser.parse_args(words.split()))
    json.dumps(result)
    assert [row["seq_len"] for row in result["rows"]] == [32] * 4 + [64] * 2
    assert [row["mixer"] for row in result["rows"][:2]] == ["vq", "sdpa"]
    assert result["threads"] == 1 and result["torch"] == torch.__version__
    assert {"device", "date", "sizes", "repeats", "clock"} <= result.keys()


def test_run_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    path = tmp_path / "a.svg"
    words = f"attention --lengths 32 --repeats 1 --plot {path}"
    bench.run(parser.parse_args(words.split()))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and "as fast as sdpa" in table[0]
    assert path.exists()
