"""Trainings that are killed, starved and damaged, and go on as if nothing had been.

    python tests/faults/campaign.py --kills 200

Every training is `vqlm train --resume auto`, called until it ends well, in forks of a process that
has imported everything.  After every fault: each checkpoint that claims to be complete is valid,
the run folder's own model can be read, and no more than the last save intervals is lost.  At the
end the files are, byte for byte, those of a training that nothing happened to.  Linux only.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # so that no fork has to import it
from same_files import compare, compare_logs, files_of, newest_of, without_best

from vqlm import checkpoint, cli, durable, train, watch

STEPS, SAVE_EVERY = 24, 3
SETTINGS = (
    f"n_layer=1 d_model=16 n_head=1 d_k=8 d_v=8 d_ff=24 n_code=8 window=8 block=8 batch_size=4 "
    f"seq_len=16 context_len=48 warmup_steps=2 steps={STEPS} save_every={SAVE_EVERY} log_every=1 "
    "eval_every=4 eval_bytes=100 codebook_start=kmeans revive_below=0.5 dropout_residual=0.1 "
    "deterministic=true on_divergence=roll_back"
).split()
Hook = Callable[[], None]


def write_texts(folder: Path) -> None:
    """A small corpus."""
    folder.mkdir()
    words, dice = "state code vector window means query value block model".split(), random.Random(0)
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(dice.choices(words, k=60)))


class Fork:
    """One call of ``vqlm train``, in a process of its own."""

    def __init__(self, words: list[str], log: Path, hook: Hook, rank: dict[str, str]) -> None:
        self._step = mmap.mmap(-1, 8)
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.environ.update(rank)
            torch.set_num_threads(1)
            self._count_steps()
            hook()
            code = cli.main(words)
        finally:
            os._exit(code)

    def _count_steps(self) -> None:
        step = train.Trainer.step

        def counted(trainer: Any, batch: Any) -> Any:
            sums = step(trainer, batch)
            self._step[:] = struct.pack("<q", trainer.progress.step)
            return sums

        train.Trainer.step = counted  # type: ignore[method-assign]

    @property
    def steps(self) -> int:
        """Steps that it has made."""
        return int(struct.unpack("<q", self._step[:])[0])

    def kill(self) -> None:
        """At once."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.kill()
        os.waitpid(self.pid, 0)
        raise AssertionError(f"a training hangs: {self.log.read_text()[-2000:]}")


# -- faults that a fork does to itself ----------------------------------------------------------


def nothing() -> None:
    """No fault."""


def killed_while_saving(dice: random.Random) -> Hook:
    """SIGKILL before or in the middle of some call that changes a file or folder."""
    left = dice.randrange(1, 90)

    def count() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def doomed(call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if count():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return called

    def hook() -> None:
        for name in ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir"):
            setattr(os, name, doomed(getattr(os, name)))
        write = durable.write

        def half(path: Path, content: bytes) -> None:
            if count():
                path.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)

        durable.write = half

    return hook


def jumping_clock(dice: random.Random) -> Hook:
    """The time of day leaps, by years and both ways, at every look."""

    def hook() -> None:
        time.time = lambda: dice.uniform(0, 4e9)
        watch.BEAT_SECONDS = 0.02

    return hook


def full_disk(dice: random.Random) -> Hook:
    """Some of the writes of checkpoints find no room, for a while; half of the file is there."""
    begin, length = dice.randrange(30), dice.randrange(1, 30)

    def hook() -> None:
        write, calls = durable.write, [0]

        def maybe(path: Path, content: bytes) -> None:
            calls[0] += 1
            if begin <= calls[0] < begin + length:
                path.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, content)

        durable.write = maybe

    return hook


def small_files(dice: random.Random) -> Hook:
    """The system itself refuses to let any file grow beyond a size, in the middle of a write."""
    most = int(10 ** dice.uniform(2, 5))

    def hook() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return hook


# -- the campaign -------------------------------------------------------------------------------


class Campaign:
    """Runs of one training under faults, each compared with the same without."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.dice = place, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.most_lost = {False: 0, True: 0}
        """Steps lost at most, by whether saving was in the background."""
        write_texts(place / "texts")
        self.references = {False: self._reference(False), True: self._reference(True)}

    def fork(
        self, run: Path, background: bool, hook: Hook = nothing, rank: dict[str, str] | None = None
    ) -> Fork:
        """Calls ``vqlm train --resume auto`` for ``run``."""
        words = ["train", "mini", *SETTINGS, f"background_saves={str(background).lower()}"]
        words += ["--data", str(self.place / "texts"), "--out", str(run), "--resume", "auto"]
        return Fork(words, run.with_name(f"{run.name}.log"), hook, rank or {})

    def finish(self, run: Path, background: bool, was_full: bool = False) -> None:
        """Goes on to the end, and compares with the training that nothing happened to."""
        fork = self.fork(run, background)
        code = fork.wait()
        assert code == 0, f"exit code {code}: {fork.log.read_text()[-3000:]}"
        got, want = files_of(run), self.references[background]
        if was_full:  # what was to be kept then was never written
            got, want = (without_best(newest_of(files)) for files in (got, want))
        compare(got, want)
        compare_logs(run, self.place / f"reference-{background}")
        shutil.rmtree(run)
        self.counts["trainings finished and equal"] += 1

    def _reference(self, background: bool) -> dict[str, bytes]:
        run = self.place / f"reference-{background}"
        code = self.fork(run, background).wait()
        assert code == 0, run.with_name(f"{run.name}.log").read_text()[-3000:]
        return files_of(run)

    def check(self, run: Path, background: bool, steps: int) -> None:
        """What must hold after a fault that came ``steps`` steps into the training."""
        saved = 0
        for folder in checkpoint.complete_checkpoints(run):
            _, info = checkpoint.load_trainer(folder)
            saved = info["step"]
        if (run / "model.safetensors").exists():
            checkpoint.load_model(run)
        lost = steps - saved
        allowed = (2 if background else 1) * SAVE_EVERY
        assert lost <= allowed, f"{lost} steps lost, saved {saved} of {steps}"
        self.most_lost[background] = max(self.most_lost[background], lost)
        best = [x for x in (run / "best", run / ".best.replaced") if x.exists()]
        assert best or steps <= 4 or saved < 4, "the best model is gone"
        for folder in best[:1]:
            checkpoint.load_model(folder)

    def kills(self, number: int) -> None:
        """SIGKILL at random moments, half of them within saving, under a clock that jumps."""
        run, fresh, done = self.place / "killed", True, 0
        background = False
        while done < number:
            if fresh:
                background, fresh = not background, False
            saving = self.dice.random() < 0.5
            hook = killed_while_saving(self.dice) if saving else jumping_clock(self.dice)
            fork = self.fork(run, background, hook)
            if not saving:
                time.sleep(self.dice.uniform(0.02, 1.2))
                fork.kill()
            code = fork.wait()
            if code == -signal.SIGKILL:
                done += 1
                self.counts["kills while saving" if saving else "kills at any moment"] += 1
                self.check(run, background, max(fork.steps, 0))
            else:
                assert code == 0, f"exit code {code}: {fork.log.read_text()[-3000:]}"
            if checkpoint.newest_checkpoint(run) and fork.steps >= STEPS - 2:
                self.finish(run, background)
                fresh = True
        if run.exists():
            self.finish(run, background)

    def full_disks(self, number: int) -> None:
        """No room for some files, or for the rest of a file; then there is room again."""
        for i in range(number):
            run, background = self.place / f"full{i}", i % 2 == 1
            make = full_disk if i % 4 < 2 else small_files
            fork = self.fork(run, background, make(self.dice))
            code = fork.wait()
            # 0: the last save went well; 2: it did not.  The log may be full as well.
            assert code in (0, 2), f"exit code {code}: {fork.log.read_text()[-3000:]}"
            self.counts[f"full disks, exit code {code}"] += 1
            for folder in checkpoint.complete_checkpoints(run):
                checkpoint.load_trainer(folder)
            self.finish(run, background, was_full=True)

    def damages(self, number: int) -> None:
        """A file of the newest checkpoint is cut short, or a bit of it flips."""
        for i in range(number):
            run, background = self.place / f"damaged{i}", i % 2 == 1
            fork = self.fork(run, background)
            while fork.steps < self.dice.randrange(3 * SAVE_EVERY, STEPS - 3):
                time.sleep(0.002)
            fork.kill()
            fork.wait()
            newest = checkpoint.newest_checkpoint(run)
            assert newest is not None
            path = self.dice.choice(sorted(newest.iterdir()))
            content = bytearray(path.read_bytes())
            if self.dice.random() < 0.5:
                content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
            else:
                del content[self.dice.randrange(len(content)) :]
            path.unlink()
            path.write_bytes(content)
            try:
                checkpoint.load_trainer(newest)
            except ValueError:
                self.counts["damaged files noticed"] += 1
            else:
                raise AssertionError(f"{path} was damaged, and nobody noticed")
            code = (last := self.fork(run, background)).wait()
            assert code == 0, last.log.read_text()[-3000:]
            shutil.rmtree(run / f"checkpoints/damaged-{newest.name}", ignore_errors=True)
            self.finish(run, background)

    def pairs(self, number: int) -> None:
        """Two trainings are started on one folder at the same time."""
        for i in range(number):
            run = self.place / f"pair{i}"
            forks = [self.fork(run, False) for _ in range(2)]
            codes = sorted(fork.wait() for fork in forks)
            # The second may also come when the first is done, and find nothing left to do.
            assert codes in ([0, 2], [0, 0]), f"{codes}: {forks[0].log.read_text()[-3000:]}"
            if codes == [0, 2]:
                assert "another training is writing to" in forks[0].log.read_text()
                self.counts["second trainings refused"] += 1
            self.finish(run, False)

    def killed_ranks(self, number: int) -> None:
        """One of two processes of a training is killed; both are started anew."""
        plain = self.place / "ranks-reference"
        assert [f.wait() for f in self._ranks(plain)] == [0, 0], plain.with_suffix(".log")
        wanted = files_of(plain)
        for i in range(number):
            run = self.place / f"ranks{i}"
            forks = self._ranks(run)
            victim = forks[i % 2]
            while victim.steps < self.dice.randrange(4, STEPS - 4):
                time.sleep(0.002)
            victim.kill()
            assert victim.wait() == -signal.SIGKILL
            # torchrun would end the other; it must not hang before that either.
            assert forks[1 - i % 2].wait() != 0
            self.check(run, False, victim.steps)
            codes = [f.wait() for f in self._ranks(run)]
            assert codes == [0, 0], run.with_name(f"{run.name}.log").read_text()[-3000:]
            compare(files_of(run), wanted)
            self.counts["ranks killed"] += 1

    def _ranks(self, run: Path) -> list[Fork]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.fork(run, False, rank={**shared, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(2)
        ]

    def tiny_disk(self) -> None:
        """A disk of the system's that is really full; needs the right to mount one."""
        disk = self.place / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            self.counts["tiny disks, not allowed to mount one"] += 1
            return
        try:
            run = disk / "run"
            code = self.fork(run, False).wait()
            assert code in (0, 2), code
            for folder in checkpoint.complete_checkpoints(run):
                checkpoint.load_trainer(folder)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            self.counts[f"tiny disks, exit code {code}"] += 1
            self.finish(run, False, was_full=True)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def campaign(place: Path, kills: int, others: int, seed: int) -> dict[str, Any]:
    """All faults, so many of each; returns counts.

    Raises:
        AssertionError: something was lost, torn, or not as without the faults.
    """
    began = time.monotonic()
    all_of_it = Campaign(place, seed)
    all_of_it.kills(kills)
    all_of_it.damages(others)
    all_of_it.full_disks(others)
    all_of_it.pairs(max(1, others // 4))
    all_of_it.killed_ranks(max(1, others // 8))
    all_of_it.tiny_disk()
    lost = {"saving at once": all_of_it.most_lost[False], "behind": all_of_it.most_lost[True]}
    seconds = round(time.monotonic() - began)
    return {**all_of_it.counts, "most steps lost": lost, "save every": SAVE_EVERY,
            "seed": seed, "seconds": seconds}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, starve and damage trainings.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, default=40, help="full disks, damaged files, ...")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vqlm-faults-") as place:
        result = campaign(Path(place), args.kills, args.others, args.seed)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
