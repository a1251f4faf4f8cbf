"""Studies: every cell is trained once, interrupted ones go on, tables add up."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from vqlm import ablate, checkpoint, presets, throughput
from vqlm.ablate import Cell, cells, run_cell, summarise
from vqlm.data import Corpus
from vqlm.evaluate import evaluate
from vqlm.prepared import open_corpus
from vqlm.train import Trainer

BASE = (tiny.MODEL, tiny.TRAIN)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "docs"
    tiny.corpus(folder)
    return folder


@pytest.fixture
def corpus(data: Path) -> Corpus:
    return open_corpus(data)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    return parser.parse_args(words)


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """As if Ctrl-C came in the step that is the ``calls``-th of all."""
    step, seen = Trainer.step, []

    def stepped(self: Trainer, batch: Any) -> Any:
        seen.append(self)
        self.stop_requested = len(seen) == calls
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", stepped)


def test_cells_differ_in_the_setting_and_the_seed_alone() -> None:
    made = cells("codes", ["8", "16", "8"], [0, 1], BASE)
    assert [c.name for c in made] == [f"n_code={n},seed={s}" for s in (0, 1) for n in (8, 16)]
    assert [(c.model.n_code, c.train.seed) for c in made] == [(8, 0), (16, 0), (8, 1), (16, 1)]
    on, off = cells("cache", ["on", "off"], [3], BASE)
    assert (on.model.cache, off.model.cache) == (True, False)
    assert on.model == tiny.MODEL and on.train == off.train
    assert off.name == "cache=off,seed=3"


@pytest.mark.parametrize(
    ("study", "values", "seeds", "message"),
    [
        ("codes", [], [0], "at least one value"),
        ("codes", ["8"], [], "at least one value"),
        ("codes", ["many"], [0], "n_code='many'"),
        ("codes", ["0"], [0], "n_code=0"),
        ("cache", ["maybe"], [0], "cache='maybe'"),
    ],
)
def test_impossible_cells_are_refused(
    study: str, values: list[str], seeds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cells(study, values, seeds, BASE)


def test_a_cell_is_trained_evaluated_and_never_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus, data: Path
) -> None:
    (cell,) = cells("codes", ["8"], [0], BASE)
    result = run_cell(cell, corpus, str(data), tmp_path, context=16)
    assert result is not None and result["tokens"] == 6 * 4 * 16 and result["minutes"] > 0
    model = checkpoint.load_model(tmp_path / "n_code=8,seed=0")
    want = evaluate(model, corpus.test, context_len=16)
    assert result["bits_per_byte"] == want.bits_per_byte
    assert want.bits_per_byte != evaluate(model, corpus.test).bits_per_byte

    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained a finished cell"))
    assert run_cell(cell, corpus, str(data), tmp_path, context=16) == result


def test_an_interrupted_cell_goes_on_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus
) -> None:
    (cell,) = cells("codes", ["8"], [0], BASE)
    whole = run_cell(cell, corpus, None, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run_cell(cell, corpus, None, tmp_path / "cut") is None
    folder = tmp_path / "cut" / cell.name
    assert not (folder / "result.json").exists()
    newest = checkpoint.newest_checkpoint(folder)
    assert newest is not None and newest.name == "step-00000003"
    stop_at(monkeypatch, 4)  # so it would stop, if it began from the beginning
    again = run_cell(cell, corpus, None, tmp_path / "cut")
    assert whole is not None and again is not None
    assert {**again, "minutes": 0} == {**whole, "minutes": 0}


def test_a_cell_that_was_stopped_before_its_evaluation_is_only_evaluated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus
) -> None:
    (cell,) = cells("codes", ["8"], [0], BASE)
    whole = run_cell(cell, corpus, None, tmp_path)
    (tmp_path / cell.name / "result.json").unlink()
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained on"))
    assert run_cell(cell, corpus, None, tmp_path) == whole


def test_a_folder_of_something_else_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    import dataclasses

    (cell,) = cells("codes", ["8"], [0], BASE)
    run_cell(cell, corpus, None, tmp_path)
    slower = dataclasses.replace(cell.train, learning_rate=1e-4)
    with pytest.raises(ValueError, match="learning_rate is 0.002 there and 0.0001 here; use anot"):
        run_cell(dataclasses.replace(cell, train=slower), corpus, None, tmp_path)
    with pytest.raises(ValueError, match="context is None there and 16 here"):
        run_cell(cell, corpus, None, tmp_path, context=16)
    other = tiny.corpus(tmp_path / "other", n_word=9)
    with pytest.raises(ValueError, match="fingerprint is"):
        run_cell(cell, other, None, tmp_path)
    (tmp_path / cell.name / "cell.json").unlink()
    with pytest.raises(ValueError, match="no part of a study"):
        run_cell(cell, corpus, None, tmp_path)


def results(*facts: tuple[str, int, float, list[float]]) -> list[tuple[Cell, dict[str, Any]]]:
    """Value, seed, bits and codes in use of each."""
    found = []
    for value, seed, bits, used in facts:
        (cell,) = cells("codes", [value], [seed], BASE)
        found.append((cell, {"bits_per_byte": bits, "codes_in_use": used}))
    return found


def test_rows_by_hand() -> None:
    first, second, third = summarise(
        results(
            ("8", 1, 4.0, [8.0, 8.0]),
            ("16", 0, 1.5, [10.0]),
            ("32", 2, 1.0, []),
            ("8", 0, 2.0, [4.0, 6.0]),
        )  # fmt: skip
    )
    assert (first["value"], first["bits_per_byte"], first["difference"]) == ("8", 3.0, 0.0)
    assert first["spread"] == pytest.approx(2**0.5) and first["each"] == [2.0, 4.0]
    assert first["codes_in_use"] == 6.5
    # Against the same seed, not against the mean over seeds that the second has not run yet.
    assert (second["difference"], second["spread"], second["codes_in_use"]) == (-0.5, None, 10.0)
    assert (third["difference"], third["codes_in_use"], third["seeds"]) == (None, None, [2])
    assert summarise([]) == []


def test_the_table_has_a_line_a_value_and_no_invented_number() -> None:
    rows = summarise(results(("8", 0, 2.0, [4.0]), ("16", 1, 1.5, [])))
    head, *lines = ablate._cell_table("n_code", rows).splitlines()
    assert head.split()[0] == "n_code" and {len(line) for line in lines} == {len(head)}
    assert lines[0].split() == ["8", "1", "2.0000", "-", "4.0", "+0.0000"]
    assert lines[1].split() == ["16", "1", "1.5000", "-", "-", "-"]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_pictures_are_files_and_the_same_ones_again(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    rows = summarise(results(("8", 0, 2.0, [4.0]), ("16", 0, 1.5, []), ("16", 1, 1.6, [])))
    timed = [
        {"heads": h, "seq_len": n, "us_per_token": {a: [0.5, n / 9, n] for a in throughput.VQ}}
        for h in throughput.HEADS
        for n in (8, 16)
    ]
    for draw in (
        lambda: ablate.plot_cells(rows, "n_code", "a title", path),
        lambda: ablate.plot_throughput(timed, "a title", path),
    ):
        draw()
        first = path.read_bytes()
        assert first.startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[path.suffix])
        draw()
        assert path.read_bytes() == first


def test_a_study_is_one_command_that_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    titles = []
    plot = ablate.plot_cells
    monkeypatch.setattr(
        ablate, "plot_cells", lambda rows, field, title, path: titles.append(title) or
        plot(rows, field, title, path),
    )  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: BASE)
    args = arguments(
        "cache", "tiny", "d_model=12", "steps=2", "--data", str(data), "--out", str(tmp_path / "o"),
        "--values", "on,off", "--seeds", "0,1",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # in the second cell
        cut = ablate.run(args)
    assert cut["interrupted"] is True and [row["value"] for row in cut["rows"]] == ["on"]
    capsys.readouterr()
    whole = ablate.run(args)
    assert "interrupted" not in whole
    assert [(row["value"], row["seeds"]) for row in whole["rows"]] == [
        ("on", [0, 1]),
        ("off", [0, 1]),
    ]
    assert whole["rows"][0]["each"][0] == cut["rows"][0]["each"][0]
    out = tmp_path / "o"
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        f"cache={v},seed={s}" for v in ("off", "on") for s in (0, 1)
    ]
    assert checkpoint.load_model(out / "cache=off,seed=1").config.d_model == 12
    assert json.loads((out / "results.json").read_bytes()) == json.loads(json.dumps(whole))
    assert (out / "results.png").is_file()
    assert "tiny d_model=12 steps=2" in titles[-1]
    printed = capsys.readouterr()
    assert "test bits/byte" in printed.out and "[4/4] cache=off,seed=1" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("codes n_code=8", "give it with --values"),
        ("cache seed=1", "give it with --seeds"),
        ("codes n_layers=8", "did you mean 'n_layer'"),
        ("codes mini demo", "one preset at most"),
        ("codes minni", "did you mean 'mini'"),
        ("throughput mini", "no preset; leave out mini"),
        ("throughput steps=3", "unknown setting 'steps'"),
    ],
)
def test_mistaken_commands_are_refused(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate.run(arguments(*words.split(), "--out", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["codes --seeds a,b", "sizes", "throughput --clock sun"])
def test_malformed_arguments_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*words.split())
    assert "error: argument" in capsys.readouterr().err


def test_throughput_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = (
        "throughput d_model=8 n_head=2 d_k=4 d_v=4 n_code=5 window=3 block=4 "
        f"--lengths 8,12 --quadratic-limit 8 --repeats 1 --threads 1 --out {tmp_path}"
    )
    result = ablate.run(arguments(*words.split()))
    assert len(result["rows"]) == 6
    assert result["rows"] == json.loads((tmp_path / "throughput.json").read_bytes())["rows"]
    assert (tmp_path / "throughput.png").is_file()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 6 + 1
    assert "not run above 8 tokens" in printed[-1]
