"""``vqlm bench``: its words, and the whole way from them to JSON and a picture."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vqlm import bench, bench_limit, cli
from vqlm.bench_plot import drawn, plot

HEADS = "n_head=2 d_k=8 d_v=8 n_code=5 window=4 block=4 n_entry=5 chunk=4"
TINY = f"n_layer=1 d_model=16 {HEADS}"

MATMUL, MEMORY = bench_limit.matmul_rate, bench_limit.memory_rate


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is measured with what takes no time."""
    monkeypatch.setattr(bench_limit, "matmul_rate", _small(MATMUL, 16))
    monkeypatch.setattr(bench_limit, "memory_rate", _small(MEMORY, 1024))
    for module in ("bench_attention", "bench_model"):
        monkeypatch.setattr(f"vqlm.{module}.matmul_rate", bench_limit.matmul_rate)
    monkeypatch.setattr("vqlm.bench_decode.memory_rate", bench_limit.memory_rate)


def _small(rate: Any, size: int) -> Any:
    return lambda clock, _=None: rate(clock, size)


def run(words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    result = bench.run(parser.parse_args(words.split()))
    json.dumps(result)
    return result


FIELDS = {
    "what", "mixer", "seq_len", "pass", "ms_median", "ms_spread", "tokens_per_s", "peak_mb",
    "ratio_vs", "share_of_limit", "repeats",
}  # fmt: skip


def test_attention_at_several_lengths_and_blocks() -> None:
    result = run(
        f"attention {HEADS} --lengths 24,16 40 --blocks 4,8 --mixers vq,ovq --max-quadratic 24 "
        "--forward-from 40 --repeats 2 --threads 1 --no-memory"
    )
    rows = result["rows"]
    both = ["forward", "forward+backward"]
    names = [("vq", 4), ("vq", 8), ("ovq", None), ("sdpa", None)]
    want = [(n, *name, p) for n in (16, 24) for name in names for p in both]
    want += [(40, *name, "forward") for name in names[:3]]
    assert [(r["seq_len"], r["mixer"], r.get("block"), r["pass"]) for r in rows] == want
    for row in rows:
        assert row.keys() >= FIELDS and row["what"] == "attention" and row["peak_mb"] is None
        low, high = row["ms_spread"]
        assert 0 < low <= row["ms_median"] <= high and row["share_of_limit"] > 0
    assert rows[0]["ratio_vs"].keys() == {"vq block=8", "ovq", "sdpa"}
    assert set(result["best_block"]) == {16, 24, 40}
    assert set(result["best_block"].values()) <= {4, 8}
    assert result["threads"] == 1 and result["torch"] == torch.__version__
    assert {"device", "date", "sizes", "limit", "clock"} <= result.keys()


def test_quadratic_ones_are_repeated_less_at_great_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vqlm.bench_attention.LONG", 16)
    words = f"attention {HEADS} --lengths 16 24 --repeats 3 --repeats-long 2 --no-memory"
    rows = run(words)["rows"]
    assert [(r["mixer"], r["repeats"]) for r in rows[::2]] == [
        ("vq", 3), ("sdpa", 3), ("vq", 3), ("sdpa", 2)
    ]  # fmt: skip


def test_one_block_length_needs_no_label() -> None:
    rows = run(f"attention {HEADS} --lengths 16 --repeats 1 --no-memory")["rows"]
    assert rows[0]["block"] == 4 and rows[2]["ratio_vs"].keys() == {"vq"}


def test_memory_is_measured_unless_it_is_not_wanted() -> None:
    rows = run(f"attention {HEADS} --lengths 16 --repeats 1 --against none")["rows"]
    assert [r["peak_mb"] is not None and r["process_mb"] > 0 for r in rows] == [True, True]


def test_limit_prints_and_returns_both_rates(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("limit --lengths 64 32 --repeats 2")
    assert [r["mixer"] for r in result["rows"]] == ["float32 matrix product"] * 2 + ["memory copy"]
    assert all(r["giga_per_s"] > 0 and r["repeats"] == 2 for r in result["rows"])
    said = capsys.readouterr().out
    assert "GFLOP/s" in said and "GB/s" in said


def test_rates_by_hand() -> None:
    ticks = iter([0.0, 4.0, 10.0, 12.0])

    def clock() -> float:
        return next(ticks)

    assert MATMUL(clock, 10) == bench_limit.TIMES * 2 * 10**3 / 4
    assert MEMORY(clock, 400) == bench_limit.TIMES * 2 * 400 / 2
    assert bench_limit.summary([1e9, 3e9, 2e9]) == {"median": 2, "spread": [1.5, 2.5]}


def test_official_counts_tokens_for_each_gflop_on_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    result = run(f"official {TINY} --lengths 16 --repeats 1 --no-memory")
    (row,) = result["rows"]
    assert result["bench"] == row["what"] == "official"
    want = row["tokens_per_s"] / result["limit"]["median"]
    assert row["tokens_per_gflop"] == pytest.approx(want, abs=0.01)


def test_threads_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run("limit --lengths 8 --repeats 1 --threads 3")
    run(f"official {TINY} --lengths 16 --repeats 1 --no-memory")
    with pytest.raises(ValueError, match="unknown mixer"):
        run("attention --mixers none --against sdpb --threads 3")
    assert asked == [3, 1, 1, 1, 3, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("attention n_cod=5", "did you mean 'n_code'"),
        ("attention stray", "written as key=value"),
        ("attention --mixers vp", "did you mean 'vq'"),
        ("attention --lengths 0", "at least one"),
        ("attention --repeats 0", "want at least 1"),
        ("attention --blocks 0", "blocks of at least one"),
        ("model --against lama", "did you mean 'llama'"),
        ("decode --against sdpa", "unknown model"),
        ("decode --tokens 0", "at least one"),
        ("limit n_code=5", "has no sizes"),
        ("fidelity n_code=5", "has no sizes"),
        ("attention --precision bfloat16", "does not read --precision, which is for model, off"),
        ("attention --compile", "does not read --compile, which is for model, official"),
        ("model --stretch 64", "--stretch says how --checkpointing is done"),
        ("decode --stretch 64", "does not read --stretch, which is for model, official"),
        ("limit --mixers zzz", "does not read --mixers, which is for attention, model, official"),
        ("fidelity --threads 1", "does not read --threads, which is for"),
        ("attention d_model=64", "does not read d_model, which is for model, official and decode"),
        ("model mixers=ovq", "give them with --mixers"),
    ],
)
def test_mistakes_are_answered(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_words_may_stand_anywhere_and_help_names_every_benchmark(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "bench attention --repeats 1 --lengths 8 --no-memory n_head=1 --json block=3".split()
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sizes"]["n_head"] == 1 and result["rows"][0]["block"] == 3
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in bench.HELP)


def test_every_option_has_its_readers() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert vars(parser.parse_args(["limit"])).keys() - {"benchmark", "what", "memory"} == (
        bench.READ_BY.keys()
    )


def _rows() -> list[dict[str, Any]]:
    return [
        {
            "what": "attention", "mixer": mixer, "seq_len": n, "pass": p, "ms_median": ms,
            "ms_spread": (0.9 * ms, 1.2 * ms), "tokens_per_s": 1e3 * n / ms,
            "ratio_vs": {"vq": 0.5} if mixer == "sdpa" else {},
        }
        for n in (512, 1024, 65536)
        for p in ("forward", "forward+backward")
        for mixer, ms in (("vq", n / 100), ("vq", n / 90), ("sdpa", n * n / 1000))
        if mixer == "vq" or n < 2048
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_plot_writes_a_file_and_the_same_one_again(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    plot(_rows(), path, "eight heads")
    first = path.read_bytes()
    assert first.startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[path.suffix])
    plot(_rows(), path, "eight heads")
    assert path.read_bytes() == first


def test_plot_shows_the_longest_pass_and_the_fastest_block() -> None:
    rows = drawn(_rows())
    assert [(r["mixer"], r["seq_len"]) for r in rows] == [
        ("vq", 512), ("sdpa", 512), ("vq", 1024), ("sdpa", 1024), ("vq", 65536)
    ]  # fmt: skip
    assert all(r["pass"] == "forward+backward" for r in rows)
    assert all(r["ms_median"] == r["seq_len"] / 100 for r in rows if r["mixer"] == "vq")


@pytest.mark.parametrize(
    "words", [f"attention {HEADS}", f"official {TINY}", f"decode {TINY} --tokens 2"]
)
def test_run_draws(words: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.svg"
    run(f"{words} --lengths 8 16 --repeats 1 --no-memory --against none --plot {path}")
    assert path.read_text().startswith("<?xml")
