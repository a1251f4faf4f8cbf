"""Saving in the background, and twice the same bytes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_OF_IT, DROPOUT, after_step, assert_same, fit, trainer

from vqlm import checkpoint, durable, saver
from vqlm.data import Corpus
from vqlm.saver import Saver


def files_of(run: Path) -> dict[str, bytes]:
    """Everything but what times are in by their nature."""
    found = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith(("events", "metrics", "heartbeat", "."))
    }


@pytest.mark.parametrize("background", [False, True])
def test_two_deterministic_runs_write_the_same_bytes(
    background: bool, data: Corpus, run: Path
) -> None:
    settings = dict(deterministic=True, save_every=2, eval_every=2, **ALL_OF_IT)
    first = trainer(data, run, DROPOUT, **settings)
    first.fit()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(99)
    second = trainer(data, run.with_name("second"), DROPOUT, **settings)
    fit(second, stop_after=3)
    second = trainer(data, second.out, DROPOUT, **settings)
    second.resume()
    second.fit()
    one, two = files_of(first.out), files_of(second.out)
    assert len(one) > 12 and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    third = trainer(data, run.with_name("third"), DROPOUT, **settings | {"seed": 1})
    third.fit()
    assert files_of(third.out)["model.safetensors"] != one["model.safetensors"]


def test_only_repeatable_operations_are_let_through(data: Corpus, run: Path) -> None:
    seen: list[bool] = []
    for wanted in (True, False):
        training = trainer(data, run.with_name(str(wanted)), steps=1, deterministic=wanted)
        after_step(training, 1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
        training.fit()
    assert seen == [True, False]


def held_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on a save waits, holding what it was given, until the result is called."""
    gate, write = threading.Event(), checkpoint.save_checkpoint

    def waits(*args: Any, **kwargs: Any) -> Path:
        assert gate.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", waits)
    return gate.set


def test_a_save_in_the_background_holds_what_was_when_it_began(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writing begins two steps later, and gives the bytes that it would have given at once."""
    settings = dict(deterministic=True, steps=5, save_every=3, **ALL_OF_IT)
    plain = trainer(data, run, DROPOUT, **settings)
    plain.fit()
    late = trainer(data, run.with_name("late"), DROPOUT, background_saves=True, **settings)
    release = held_back(monkeypatch)
    begun = after_step(late, 5, release)
    late.fit()
    assert len(begun) == 5
    one, two = files_of(plain.out), files_of(late.out)
    assert one.keys() == two.keys()
    differ = {name for name in one if one[name] != two[name]}
    # The setting itself is in trainer.json, and its digest in trainer.safetensors.
    assert {Path(name).name for name in differ} == {"trainer.json", "trainer.safetensors"}
    for step in (3, 5):
        name = f"checkpoints/step-{step:08d}"
        got, want = (checkpoint.load_trainer(x.out / name)[0] for x in (late, plain))
        assert_same(got, want)


def test_a_background_save_that_fails_is_told_of(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, failures = durable.write, {"step-00000002"}

    def full(path: Path, content: bytes) -> None:
        name = path.parent.name.removeprefix(".").removesuffix(".partial")
        if name in failures and path.name == "trainer.json":
            failures.remove(name)
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(durable, "write", full)
    trainer(data, run, steps=6, save_every=2, background_saves=True).fit()
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert len(warnings) == 1 and "step-00000002 (No space left on device)" in warnings[0]
    names = [x.name for x in checkpoint.complete_checkpoints(run)]
    assert not failures and names == ["step-00000004", "step-00000006"]


def test_a_last_background_save_that_fails_is_made_up_for(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped right after the save of that step was begun: it is known to have failed at the end,
    and done again."""
    write, failures = durable.write, {"step-00000004"}

    def full(path: Path, content: bytes) -> None:
        if path.name == "trainer.json" and path.parent.name[1:-8] in failures:
            failures.clear()
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(durable, "write", full)
    fit(trainer(data, run, save_every=2, background_saves=True), stop_after=4)
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert len(warnings) == 1 and "step-00000004 (No space left on device)" in warnings[0]
    assert [x.name for x in checkpoint.complete_checkpoints(run)][-1] == "step-00000004"


def test_one_save_at_a_time_and_none_is_lost() -> None:
    order: list[str] = []
    gate = threading.Event()

    def first() -> None:
        order.append("first begins")
        gate.wait(30)
        order.append("first ends")
        raise OSError(28, "full")

    one = Saver()
    one.start(first)
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(OSError, match="full"):
        one.start(lambda: order.append("second"))
    assert one.finish() is None and one.finish() is None
    assert order == ["first begins", "first ends", "second"]
    one.start(lambda: order.append("third"))
    one.close()
    assert order[-1] == "third"


def test_what_is_no_full_disk_is_not_hidden() -> None:
    one = Saver()
    one.start(lambda: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        one.finish()
    one.close()


def test_copies_are_copies() -> None:
    x = torch.ones(3, requires_grad=True)
    copy = saver.copied({"x": x})["x"]
    with torch.no_grad():
        x.add_(1)
    assert copy.tolist() == [1, 1, 1] and not copy.requires_grad
