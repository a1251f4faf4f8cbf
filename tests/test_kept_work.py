"""Nothing that somebody has trained or written is lost by a later command."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import corpus, fit, trainer

from vqlm import checkpoint, demo, presets
from vqlm.checkpoint import complete_checkpoints, newest_checkpoint
from vqlm.data import Corpus
from vqlm.guard import LOCK, alone_in


@pytest.fixture
def data(tmp_path: Path) -> Corpus:
    return corpus(tmp_path / "text")


@pytest.fixture
def run(data: Corpus, tmp_path: Path) -> Path:
    """Of a training of 6 steps, with a checkpoint at 3 and at 6, and a look at its end."""
    trainer(data, tmp_path / "run", save_every=3).fit()
    return tmp_path / "run"


@pytest.fixture
def made_by_demo(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``run``, as if the demo's preset had made it."""
    trained = json.loads((run / "checkpoints/step-00000006/trainer.json").read_bytes())["train"]
    model, config = presets.demo()
    config = dataclasses.replace(config, **trained)
    monkeypatch.setattr(presets, "demo", lambda: (model, config))
    return run


class Begins(Exception):
    """The demo has begun to train."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object) -> None:
        raise Begins

    monkeypatch.setattr(demo, "Trainer", begin)


@pytest.mark.usefixtures("stopped")
def test_the_demo_makes_its_own_folder_anew(made_by_demo: Path) -> None:
    (made_by_demo / "report").mkdir()
    with pytest.raises(Begins):
        demo.run(made_by_demo)
    assert not complete_checkpoints(made_by_demo)


@pytest.mark.usefixtures("stopped")
def test_the_demo_makes_anew_what_was_stopped_before_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(Begins):
        demo.run(tmp_path)
    with pytest.raises(Begins):
        demo.run(tmp_path / "new")


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("saved", [False, True])
def test_the_demo_makes_anew_what_was_killed_in_a_save(made_by_demo: Path, saved: bool) -> None:
    for name in (".best.partial", ".best.replaced", "checkpoints/.step-00000009.partial"):
        (made_by_demo / name).mkdir()
    (made_by_demo / ".config.json.partial").write_text("{")
    if not saved:  # but looked at
        for path in [*complete_checkpoints(made_by_demo), made_by_demo / "report"]:
            shutil.rmtree(path, ignore_errors=True)
        for name in checkpoint.MODEL_FILES:
            (made_by_demo / name).unlink(missing_ok=True)
        (made_by_demo / ".config.json.partial").unlink()
    with pytest.raises(Begins):
        demo.run(made_by_demo)
    assert {path.name for path in made_by_demo.iterdir()} <= {LOCK}


@pytest.mark.usefixtures("stopped")
def test_the_demo_empties_the_current_folder_but_follows_no_link(
    made_by_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(made_by_demo)
    with pytest.raises(ValueError, match="is a file or a link"):
        demo.run(tmp_path / "link")
    assert newest_checkpoint(made_by_demo)
    monkeypatch.chdir(made_by_demo)
    with pytest.raises(Begins):
        demo.run(Path())
    assert not newest_checkpoint(made_by_demo)


@pytest.mark.usefixtures("stopped")
def test_the_demo_leaves_alone_what_it_has_not_made(
    made_by_demo: Path, tmp_path: Path, data: Corpus
) -> None:
    thesis = made_by_demo / "thesis.txt"
    thesis.write_text("work")
    with pytest.raises(ValueError, match="is not empty"):
        demo.run(made_by_demo)
    thesis.unlink()
    other = tmp_path / "other"
    trainer(data, other, steps=2).fit()
    with pytest.raises(ValueError, match="holds a run that is no demo's"):
        demo.run(other)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        demo.run(model)
    (tmp_path / "own/checkpoints/mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty"):
        demo.run(tmp_path / "own")
    with alone_in(made_by_demo), pytest.raises(ValueError, match="another training"):
        demo.run(made_by_demo)
    assert newest_checkpoint(made_by_demo) and newest_checkpoint(other)
    assert (model / "config.json").exists()


def test_a_resumed_run_keeps_the_best_model_that_its_last_look_found(
    data: Corpus, run: Path
) -> None:
    """The look at a training's end comes after its last checkpoint."""
    best = checkpoint.load_facts(run / "best")
    assert best["step"] == 6
    assert checkpoint.load_facts(run / "checkpoints/step-00000006")["progress"]["best_nats"] is None
    worse = trainer(data, run, steps=8, learning_rate=9.0, schedule="constant", clip_norm=None)
    worse.resume()
    assert worse.progress.best_nats == best["progress"]["best_nats"]
    worse.fit()
    assert worse.newest_look is not None
    assert worse.newest_look[1].nats / worse.newest_look[1].n_tokens > worse.progress.best_nats
    assert checkpoint.load_facts(run / "best")["step"] == 6


@pytest.mark.parametrize("nats", ["", "NaN", "1" + 400 * "0", "-1"])
def test_the_best_is_sought_anew_where_none_can_be_read(data: Corpus, run: Path, nats: str) -> None:
    path = run / "best/trainer.json"
    known = str(checkpoint.load_facts(run / "best")["progress"]["best_nats"])
    path.write_text(path.read_text().replace(known, nats))
    again = trainer(data, run, steps=7)
    again.resume()
    assert again.progress.best_nats is None
    again.fit()
    assert checkpoint.load_facts(run / "best")["step"] == 7


def test_resuming_leaves_what_another_training_has_saved_meanwhile(
    data: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fit(trainer(data, run), 3)
    ours = trainer(data, run)
    load = ours.processes.load_weights

    def meanwhile(model: torch.nn.Module, path: Path) -> None:
        theirs = trainer(data, run)
        theirs.resume()
        theirs.fit()
        load(model, path)

    monkeypatch.setattr(ours.processes, "load_weights", meanwhile)
    ours.resume()
    assert ours.progress.step == 3
    assert [x.name for x in complete_checkpoints(run)] == ["step-00000003", "step-00000006"]
    assert not list(run.glob("checkpoints/damaged-*"))


def test_who_writes_into_a_run_folder_does_not_write_into_its_checkpoint(run: Path) -> None:
    newest = newest_checkpoint(run)
    assert newest is not None
    for name in ("config.json", "data.json"):
        with open(run / name, "a") as file:
            file.write(" ")
    checkpoint.load_trainer(newest)
    assert os.path.samefile(run / "model.safetensors", newest / "model.safetensors")


def test_nothing_partial_stays_where_a_run_is_published_again(run: Path) -> None:
    checkpoint.settle(run, keep=2)
    assert not list(run.glob(".*partial"))
