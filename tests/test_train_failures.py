"""What goes wrong in a training: nothing that was saved is lost, and the message has a way out."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALL_OF_IT, DROPOUT, after_step, assert_same, corpus, everything, fit, trainer

from vqlm import checkpoint, cli, durable, guard, runlog, sealed
from vqlm.checkpoint import complete_checkpoints, load_model, newest_checkpoint
from vqlm.data import Corpus
from vqlm.evaluate import Evaluation
from vqlm.train import Trainer, TrainingDiverged


def assert_all_finite(run: Path) -> None:
    """Every tensor of every checkpoint, and of the run folder itself."""
    files = [*run.rglob("*.safetensors")]
    assert files
    for file in files:
        assert all(x.isfinite().all() for x in sealed.unpack(file)[0].values())


def poison(run: Trainer, where: str) -> None:
    """Puts not-a-number into one weight, one code, or one of Adam's moments."""
    if where == "weight":
        run.bare_model.output.weight.data[5, 3] = torch.nan
    elif where == "codebook":
        run.bare_model.layers[0].mixer.codebook.key_sum[0, 2, 1] = torch.nan
    else:
        next(iter(run.optimizer.state.values()))["exp_avg"][0] = torch.inf


def test_what_is_left_of_a_save_is_done_by_resuming(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves in turn were stopped when their checkpoints were complete, the last one among
    them: nothing is left to train, and yet the run folder and what is kept are those of a whole."""

    class Killed(BaseException):
        pass

    def killed(folder: Path, out: Path) -> None:
        raise Killed

    for last in (4, 6):
        training = trainer(data, run, save_every=2, keep=1)
        if last == 6:
            training.resume()
        after_step(training, last, lambda: monkeypatch.setattr(checkpoint, "_publish", killed))
        with pytest.raises(Killed):
            training.fit()
        monkeypatch.undo()
    assert [x.name for x in complete_checkpoints(run)] == [f"step-{n:08d}" for n in (2, 4, 6)]
    training = trainer(data, run, save_every=2, keep=1)
    training.resume()
    training.fit()
    (newest,) = complete_checkpoints(run)
    assert newest.name == "step-00000006"
    assert (run / "model.safetensors").samefile(newest / "model.safetensors")


@pytest.mark.parametrize("where", ["weight", "codebook", "moment"])
@pytest.mark.parametrize(
    ("save_every", "log_every", "eval_every"), [(1, 9, 9), (2, 2, 9), (2, 9, 2)]
)
def test_nothing_that_is_not_finite_is_saved_or_logged(
    where: str, save_every: int, log_every: int, eval_every: int, data: Corpus, run: Path
) -> None:
    """With save_every=1 the save comes right after, when no loss has shown it yet."""
    settings = dict(steps=7, save_every=save_every, log_every=log_every, eval_every=eval_every)
    training = trainer(data, run, **settings)
    after_step(training, 5, lambda: poison(training, where))
    with pytest.raises(TrainingDiverged) as error:
        training.fit()
    last_good = run / "checkpoints" / f"step-{5 - 1:08d}"
    assert newest_checkpoint(run) == last_good
    assert f"the last good checkpoint is {last_good}" in str(error.value)
    assert "lower learning_rate (now 0.002)" in str(error.value)
    assert_all_finite(run)
    assert load_model(run)(torch.tensor([[1, 100]])).logits.isfinite().all()
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    again = trainer(data, run, **settings)
    again.resume()
    assert again.fit().step == 7


def test_a_best_model_that_could_not_be_saved_is_not_the_one_to_beat(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third look is worse than the second, but than nothing else that was kept."""
    training = trainer(data, run, eval_every=2, log_every=99)
    looks = iter([3.0, 1.0, 2.0])
    training.validate = lambda: Evaluation(next(looks), 1, 1, ())  # type: ignore[method-assign]
    write = durable.write

    def full(path: Path, content: bytes) -> None:
        if path.parent.name == ".best.partial" and training.progress.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(durable, "write", full)
    kept: list[float | None] = []
    after_step(training, 5, lambda: kept.append(training.progress.best_nats))
    training.fit()
    assert kept == [3.0] and training.progress.best_nats == 2.0
    facts = checkpoint.load_facts(run / "best")
    assert facts["step"] == 6 and facts["progress"]["best_nats"] == 2.0
    assert "best (No space left on device); training goes on" in capsys.readouterr().err


@pytest.mark.parametrize("learning_rate", [1e3, 1e20, 3e38])
def test_a_huge_learning_rate_leaves_no_checkpoint_that_is_not_finite(
    learning_rate: float, data: Corpus, run: Path
) -> None:
    settings = dict(learning_rate=learning_rate, steps=40, save_every=1, warmup_steps=1)
    training = trainer(data, run, **settings)
    try:
        training.fit()
    except TrainingDiverged as error:
        newest = newest_checkpoint(run)
        said = f"last good checkpoint is {newest}" if newest else "nothing was saved yet"
        assert said in str(error)
    else:
        assert learning_rate < 1e4
    assert newest_checkpoint(run) is None or assert_all_finite(run) is None


def test_divergence_ends_the_command_with_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    corpus(tmp_path / "texts")
    words = "n_layer=1 d_model=16 n_head=1 n_code=8 batch_size=2 seq_len=16 steps=50 context_len=16"
    words += " learning_rate=1e36 warmup_steps=1 weight_decay=100.0"
    code = cli.main(["train", *words.split(), "--data", str(tmp_path / "texts"), "--out", str(run)])
    assert code == cli.EXIT_DIVERGED
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vqlm train: error: loss, gradient or model is not finite by step")
    assert "nothing was saved yet" in last


def full_disk(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path], bool]) -> list[Path]:
    """From now on, writing the files that ``fails`` picks leaves half of them and an error."""
    write = durable.write
    hit: list[Path] = []

    def half(path: Path, content: bytes) -> None:
        if not fails(path):
            return write(path, content)
        hit.append(path)
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(durable, "write", half)
    return hit


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "trainer.safetensors", "trainer.json"]
)
def test_a_periodic_save_that_fails_is_a_warning(
    name: str, data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hit = full_disk(monkeypatch, lambda path: path.name == name and "00000004" in path.parent.name)
    trainer(data, run, save_every=2, keep=9).fit()
    assert len(hit) == 1
    assert [c.name for c in complete_checkpoints(run)] == ["step-00000002", "step-00000006"]
    assert [*run.rglob("*.partial")] == []
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert "step-00000004 (No space left on device)" in warning
    assert f"the last valid checkpoint is {run / 'checkpoints/step-00000002'}" in warning
    assert "training goes on" in warning


def test_a_last_save_that_fails_names_the_checkpoint_to_use(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(data, run.with_name("whole"), save_every=4)
    wanted = fit(whole)
    hit = full_disk(
        monkeypatch, lambda path: path.name == "model.safetensors" and "00000006" in str(path)
    )
    cut = trainer(data, run, save_every=4)
    told = after_step(cut)
    with pytest.raises(OSError, match="No space left on device") as error:
        cut.fit()
    kept = run / "checkpoints/step-00000004"
    assert f"the last valid checkpoint is {kept}" in str(error.value)
    assert error.value.errno == errno.ENOSPC
    assert newest_checkpoint(run) == kept and len(hit) == 1
    assert [sums.nats.item() for sums in told] == wanted

    monkeypatch.undo()
    again = trainer(data, run, save_every=4)
    again.resume()
    assert fit(again) == wanted[4:]
    assert_same(everything(again), everything(whole))


def test_a_first_save_that_fails_says_that_there_is_none(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda path: path.name == "trainer.json")
    with pytest.raises(OSError, match="there is none yet"):
        trainer(data, run, steps=1).fit()
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        trainer(data, run).resume()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(run)


def test_saving_the_same_step_again_can_fail_without_loss(
    data: Corpus, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(data, finished, steps=3)
    training.resume()
    training.save()
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000003",
    ]  # fmt: skip
    full_disk(monkeypatch, lambda path: path.name == "trainer.json")
    with pytest.raises(OSError, match="step-00000003$"):
        training.save()
    again = trainer(data, finished, steps=3)
    again.resume()
    assert_same(everything(again), everything(training))


def test_a_log_that_cannot_be_written_is_a_warning(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, a disk that is always full")
    monkeypatch.setattr(
        runlog, "open", lambda path, mode, **how: open(full, mode, **how), raising=False
    )
    trainer(data, run).fit()
    warnings = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert len(warnings) == 4
    assert all("cannot write the log (No space left on device)" in x for x in warnings)
    assert newest_checkpoint(run) == run / "checkpoints/step-00000006"


def test_an_error_stream_on_a_full_disk_is_no_obstacle(
    data: Corpus, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that logs to a file there goes on, and a command keeps its exit code."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, a disk that is always full")
    with monkeypatch.context() as patch, open(full, "w", buffering=1) as stream:
        patch.setattr(sys, "stderr", stream)
        assert trainer(data, run, eval_every=2).fit().step == 6
        assert cli.main(["train", "--resume", str(tmp_path / "none")]) == cli.EXIT_USAGE
        with contextlib.suppress(OSError):
            stream.close()


def test_a_folder_left_by_a_killed_save_is_no_checkpoint(data: Corpus, finished: Path) -> None:
    folder = finished / "checkpoints"
    for name in (".step-00000009.partial", ".step-00000003.partial", ".step-00000002.replaced"):
        shutil.copytree(folder / "step-00000003", folder / name)
    (folder / ".step-00000009.partial/trainer.json").unlink()
    (finished / ".model.safetensors.partial").write_bytes(b"half a file")
    assert [c.name for c in complete_checkpoints(finished)] == ["step-00000002", "step-00000003"]
    training = trainer(data, finished)
    training.resume()
    assert training.progress.step == 3
    training.fit()
    left = [p.name for p in [*finished.iterdir(), *folder.iterdir()] if p.name[0] == "."]
    assert left == [guard.LOCK]
    load_model(finished)


def test_a_stop_in_the_middle_of_a_step_saves_and_goes_on_as_if_nothing_had_been(
    data: Corpus, run: Path
) -> None:
    whole = trainer(data, run.with_name("whole"), DROPOUT, **ALL_OF_IT)
    wanted = fit(whole)
    before = signal.getsignal(signal.SIGINT)
    cut = trainer(data, run, DROPOUT, **ALL_OF_IT)
    told = after_step(cut, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    cut.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert cut.stop_requested and len(told) == 3
    again = trainer(data, run, DROPOUT, **ALL_OF_IT)
    again.resume()
    assert [sums.nats.item() for sums in told] + fit(again) == wanted
    assert_same(everything(again), everything(whole))


def test_a_second_interrupt_ends_it_at_once(data: Corpus, run: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    cut = trainer(data, run, save_every=1)
    told = after_step(cut, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(told) == 3
    assert newest_checkpoint(run) == run / "checkpoints/step-00000002"


def test_training_works_in_another_thread(data: Corpus, run: Path) -> None:
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(trainer(data, run, steps=1).fit()))
    thread.start()
    thread.join()
    assert done[0].step == 1


def test_the_command_says_how_to_go_on_after_ctrl_c(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path / "texts")
    words = "n_layer=1 d_model=16 n_head=1 n_code=8 batch_size=2 seq_len=16 steps=5 context_len=16"
    command = ["train", *words.split(), "--data", str(tmp_path / "texts"), "--out"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    step = Trainer.step

    def interrupted(self: Trainer, batch: Any) -> Any:
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert cli.main([*command, str(run), "--json"]) == cli.EXIT_INTERRUPTED == 130
    said, told = capsys.readouterr().out.strip().splitlines()[-2:]
    assert said == f"Saved step 3. To go on: vqlm train --resume {run}"
    assert json.loads(told)["interrupted"] is True
    assert cli.main(said.split(": ")[1].split()[1:]) == 0
    whole, resumed = (load_model(path).state_dict() for path in (tmp_path / "whole", run))
    assert_same(resumed, whole)


def test_a_loop_of_resume_auto_outlives_terminations(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Terminated twice, called until it says 0 and once more: the model of one whole training."""
    corpus(tmp_path / "texts")
    words = "n_layer=1 d_model=16 n_head=1 n_code=8 batch_size=2 seq_len=16 steps=5 context_len=16"
    command = ["train", "mini", *words.split(), "--data", str(tmp_path / "texts"), "--out"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    step, terminations = Trainer.step, {1, 3}

    def terminated(self: Trainer, batch: Any) -> Any:
        if self.progress.step in terminations:
            terminations.remove(self.progress.step)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "step", terminated)
    codes = [cli.main([*command, str(run), "--resume", "auto"]) for _ in range(4)]
    assert codes == [cli.EXIT_TERMINATED, cli.EXIT_TERMINATED, 0, 0] and cli.EXIT_TERMINATED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Saved step 2." in capsys.readouterr().out
    whole, resumed = (load_model(path).state_dict() for path in (tmp_path / "whole", run))
    assert_same(resumed, whole)


def test_two_trainings_do_not_share_a_folder(data: Corpus, run: Path) -> None:
    with (
        guard.alone_in(run),
        pytest.raises(ValueError, match="another training is writing to .*choose another --out"),
    ):
        trainer(data, run, steps=1).fit()
    assert newest_checkpoint(run) is None
    assert trainer(data, run, steps=1).fit().step == 1


def test_a_killed_process_leaves_no_lock(run: Path) -> None:
    program = (
        "import os, pathlib, signal\nfrom vqlm import guard\n"
        f"with guard.alone_in(pathlib.Path({str(run)!r})):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", program], cwd=root)
    assert killed.returncode == -signal.SIGKILL and (run / guard.LOCK).exists()
    with guard.alone_in(run):
        pass


def test_another_model_is_refused_with_all_that_differs(data: Corpus, finished: Path) -> None:
    other = trainer(data, finished, dict(n_code=16, mixers=("window", "vq")))
    with pytest.raises(ValueError, match="another model") as error:
        other.resume()
    assert "n_code is 8 there and 16 here" in str(error.value)
    assert "mixers is ('vq',) there and ('window', 'vq') here" in str(error.value)
    assert "d_model" not in str(error.value)


def test_other_text_is_refused(data: Corpus, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "texts/0.txt").write_bytes(b"another text")
    changed = trainer(corpus(tmp_path / "texts", n_word=9), finished)
    with pytest.raises(ValueError, match="trained on other text than texts is now; give --data"):
        changed.resume()


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"seq_len": 8}, {"accumulate": 2}])
def test_other_batches_are_refused(change: dict[str, int], data: Corpus, finished: Path) -> None:
    changed = trainer(data, finished, **change)
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}=.*, not {change[name]}; resume without"):
        changed.resume()


def test_softmax_wants_to_know_when_to_forget(data: Corpus, run: Path) -> None:
    with pytest.raises(ValueError, match="set context_len, a multiple of seq_len=16"):
        trainer(data, run, dict(mixers=("window", "softmax")))
    assert not run.exists()


def test_text_shorter_than_a_window_of_every_lane_is_refused(data: Corpus, run: Path) -> None:
    with pytest.raises(ValueError, match="the largest batch_size at this seq_len is"):
        trainer(data, run, batch_size=512)
    assert not run.exists()


def test_a_vocabulary_without_all_bytes_is_refused(data: Corpus, run: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=256, but the vocabulary of texts has 259 ids"):
        trainer(data, run, dict(vocab_size=256))


def test_kmeans_wants_a_key_for_every_code(data: Corpus, run: Path) -> None:
    training = trainer(data, run, dict(n_code=65), codebook_start="kmeans")
    with pytest.raises(ValueError, match="64 keys for 65 codes.*smaller n_code"):
        training.fit()
    assert not run.exists()
