"""What watches a training: a judge of its losses, a lookout for slow decay, a heartbeat file.

    RUN/heartbeat.json    written anew every few seconds while the process lives

All intervals are of the monotonic clock: one that is set, or jumps, changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vqlm.config import TrainConfig
from vqlm.data import Batch
from vqlm.runlog import Progress

HEARTBEAT = "heartbeat.json"
"""The file's name in a run folder."""

BEAT_SECONDS, STUCK_SECONDS = 5.0, 60.0
"""Between two heartbeats; how long nothing may come of one thing before there is a warning."""

SPIKE_WINDOW, SPIKE_LEAST = 100, 20
"""Losses that the median is of, and how few are too few to judge by."""

MOST_SKIPS, MOST_ROLL_BACKS = 10, 3
"""Steps left out in a row, and returns to one checkpoint, after which the training stops."""

_PATIENCE = 5  # log lines
_SLOW = 0.5  # of the usual speed
_REPEATS = 10  # equal batches in a row
_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class TrainingDiverged(RuntimeError):
    """The loss, the gradient or the model is no longer finite, or the loss is a spike.

    ``what`` has happened; ``step_undone``: in a step that was not made, all is as it was before.
    """

    def __init__(self, what: str, advice: str, step_undone: bool) -> None:
        super().__init__(f"{what}; {advice}")
        self.what, self.step_undone = what, step_undone


class Judge:
    """Tells which steps not to make, and how often that is borne."""

    def __init__(self, config: TrainConfig) -> None:
        self.spike = config.spike
        self.at_every_step = config.spike is not None or config.on_divergence != "stop"
        """Whether ``verdict`` must be asked at each step, which waits for the device."""
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._skips = 0
        self._roll_backs = (-1, 0)

    def verdict(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm; None: nothing.

        A loss is a spike if it lies ``spike`` standard deviations above the median of the last
        ``SPIKE_WINDOW`` losses; these are estimated from the median absolute deviation, which a
        spike does not widen.  Spikes are not among the losses remembered.
        """
        if not math.isfinite(loss + norm):
            return f"loss {loss:.4g} and gradient norm {norm:.4g} are not both finite"
        if self.spike is not None and len(self._losses) >= SPIKE_LEAST:
            middle = statistics.median(self._losses)
            width = _MAD * statistics.median(abs(x - middle) for x in self._losses)
            if loss > middle + self.spike * width:
                return (
                    f"loss {loss:.4g} is a spike: the median of the last {len(self._losses)} is "
                    f"{middle:.4g}, their standard deviation {width:.2g}"
                )
        self._losses.append(loss)
        self._skips = 0
        return None

    def may_skip(self) -> bool:
        """Whether one more step in a row may be left out; counts it."""
        self._skips += 1
        return self._skips <= MOST_SKIPS

    def may_roll_back(self, step: int) -> bool:
        """Whether the training may go back to ``step`` once more; counts it."""
        before, times = self._roll_backs
        self._roll_backs = (step, times + 1 if step == before else 1)
        return self._roll_backs[1] <= MOST_ROLL_BACKS

    def state_dict(self) -> dict[str, Any]:
        """What later verdicts depend on, fit for JSON."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Judges on as the one did that gave ``state``.

        Raises:
            KeyError, TypeError, ValueError: another thing than ``state_dict`` gives.
        """
        self._losses = deque((float(x) for x in state["losses"]), SPIKE_WINDOW)


class Lookout:
    """Warns of what goes wrong slowly; each warning once, until it has passed."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self.now: dict[str, str] = {}
        """Warnings that hold at present, by what they are about."""
        self._speeds: deque[float] = deque(maxlen=50)
        self._collapsed: dict[str, int] = {}
        self._batch: torch.Tensor | None = None
        self._repeats = 0

    def set(self, about: str, warning: str | None) -> None:
        """Notes that ``warning`` holds, or that nothing is wrong ``about`` this."""
        if warning is None:
            self.now.pop(about, None)
        elif about not in self.now:
            self.now[about] = warning
            self._warn(f"warning: {warning}")

    def look_at_batch(self, batch: Batch) -> None:
        """Notices a source that gives the same batch again and again."""
        same = self._batch is not None and torch.equal(self._batch, batch.targets)
        self._repeats = self._repeats + 1 if same else 0
        self._batch = batch.targets
        text = f"the last {self._repeats + 1} batches were all the same: is the data source stuck?"
        self.set("data", text if self._repeats >= _REPEATS else None)

    def look_at(self, numbers: dict[str, float]) -> None:
        """Judges the numbers of a log line (``RunLog.write``)."""
        if not numbers:
            return
        speed = numbers["train/tokens_per_second"]
        usual = statistics.median(self._speeds) if len(self._speeds) >= 2 * _PATIENCE else 0.0
        slow = speed < _SLOW * usual
        text = f"{speed:,.0f} tokens/s, where {usual:,.0f} are usual"
        self.set("speed", text if slow else None)
        self._speeds.append(speed)
        for name, used in numbers.items():
            kind, _, place = name.partition("/")
            if kind == "codes_in_use" and "/head" in place:
                self._look_at_codebook(place, used)

    def _look_at_codebook(self, place: str, used: float) -> None:
        """One code for all keys is a dead codebook, whatever the loss says."""
        collapsed = self._collapsed[place] = self._collapsed.get(place, 0) + 1 if used < 1.5 else 0
        text = (
            f"the codebook of {place} is dead: {used:.1f} codes in use for {_PATIENCE} log lines; "
            "raise revive_below or commitment"
        )
        self.set(f"codebook {place}", text if collapsed >= _PATIENCE else None)


class Heartbeat:
    """A file that tells that a training lives, and what it is doing; a thread writes it.

    ``doing`` changes from one thing to the next; a thing that takes longer than ``STUCK_SECONDS``
    is warned of, from the thread, since the training itself is waiting then.
    """

    def __init__(self, run: Path, progress: Callable[[], Progress], lookout: Lookout) -> None:
        self._path, self._progress, self._lookout = run / HEARTBEAT, progress, lookout
        self._doing, self._since = "starting", time.monotonic()
        self._began = self._since
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="vqlm-heartbeat", daemon=True)

    def doing(self, what: str) -> None:
        """Says what comes next."""
        self._doing, self._since = what, time.monotonic()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Writes the file now, every ``BEAT_SECONDS``, and at the end."""
        self.beat()
        self._thread.start()
        try:
            yield
        except BaseException as error:
            self.doing(f"ended: {type(error).__name__}")
            raise
        else:
            self.doing("ended")
        finally:
            self._end.set()
            self._thread.join()
            self.beat()

    def _beat_on(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self.beat()

    def beat(self) -> None:
        """Writes the file in one step; a full disk is no reason to end a training."""
        doing, progress = self._doing, self._progress()
        seconds = time.monotonic() - self._since
        stuck = f"{doing} has taken {seconds:.0f} seconds so far: is it stuck?"
        self._lookout.set("stuck", stuck if seconds > STUCK_SECONDS else None)
        facts = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "pid": os.getpid(),
            "step": progress.step,
            "tokens": progress.tokens,
            "doing": doing,
            "seconds_in_it": round(seconds, 1),
            "seconds_alive": round(time.monotonic() - self._began, 1),
            "warnings": list(self._lookout.now.values()),
        }
        partial = self._path.with_name(f".{HEARTBEAT}.partial")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, self._path)
