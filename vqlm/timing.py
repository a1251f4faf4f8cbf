"""What all benchmarks share: sides timed in turn, their rows, their memory in a process of its own.

A *side* is one of the things compared.  ``build`` names a function ``module:name`` that makes it
from settings JSON can hold, so that the same side can be made again in a fresh process, whose peak
memory is then its own.  Sides run in turn, repetition by repetition in one process, so that
whatever else the machine does meets all of them, and so does the measurement of the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

REPEATS = 5
"""Default number of timings of each side."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time passed, or the processor time of this process in all its threads: with one thread the same,
except that other programs on the same core don't count."""

WARM_UP = 8192
"""Longest sequence, in tokens, at which every side runs once before it is timed."""


class Built(NamedTuple):
    """A side ready to run."""

    run: Callable[[], Iterator[str]]
    """Does the work once; yields the name of each pass when it is done.  A pass begins where the
    run began: "forward" is a part of "forward+backward"."""
    work: dict[str, float]
    """What the pass is to be held against the machine with: operations, or bytes."""
    facts: dict[str, Any] = {}  # noqa: RUF012  (immutable by convention)
    """More that its rows say, such as parameters."""


@dataclass(frozen=True)
class Side:
    """One of the things compared."""

    name: str
    build: str
    """``module:function`` that gives a ``Built``."""
    settings: dict[str, Any]
    """Its arguments, which JSON can hold."""
    repeats: int = REPEATS
    facts: dict[str, Any] = field(default_factory=dict)
    """More that its rows say, such as the block length."""
    label: str = ""
    """What the rows of others call it, if there are several of its name."""

    @property
    def key(self) -> str:
        """Its label, or else its name."""
        return self.label or self.name

    def built(self) -> Built:
        """The side itself, made in this process."""
        module, _, name = self.build.partition(":")
        made: Built = getattr(importlib.import_module(module), name)(**self.settings)
        return made


@dataclass(frozen=True)
class Row:
    """What one side took at one length in one kind of pass."""

    what: str
    """The benchmark."""
    mixer: str
    """The side's name."""
    seq_len: int
    """Tokens of the one sequence; in decoding: tokens behind the one decoded."""
    pass_: str
    """The kind of pass; "pass" in JSON."""
    ms_median: float
    """Milliseconds of a pass, in decoding of a token; the median of the repetitions."""
    ms_spread: tuple[float, float]
    """Their lower and upper quartile."""
    repeats: int
    """How many they are."""
    tokens_per_s: float
    """Tokens a second at the median."""
    peak_mb: float | None = None
    """Megabytes (10^6) that a fresh process needed at most beyond what was there before the pass:
    inputs, or parameters and optimizer; None: not measured."""
    ratio_vs: dict[str, float] = field(default_factory=dict)
    """Median time of another side over this one's, above 1 where this one is faster."""
    share_of_limit: float | None = None
    """Of the machine's rate, measured in between: products of matrices, in decoding memory."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More, such as the block length, and ``process_mb``, the peak with all that is in it."""

    def json(self) -> dict[str, Any]:
        """As a dictionary with plain values."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("pass_", "facts")}
        return {"pass": self.pass_, **fields, **self.facts}


@dataclass(frozen=True)
class Plan:
    """How rows are measured."""

    what: str
    """The benchmark, as in ``Row.what``."""
    limit: Callable[[Callable[[], float]], float]
    """Given the clock, the machine's rate at this moment, in units of ``Built.work`` a second."""
    clock: Callable[[], float] = time.perf_counter
    memory: bool = True
    """Whether peak memory is measured."""
    report: Callable[[Row], None] = lambda row: None
    """Called with each row as soon as it is known."""

    def rows(
        self, sides: Sequence[Side], seq_len: int, tokens: int, *, steps: int = 1
    ) -> tuple[list[Row], list[float]]:
        """Rows of all sides, and the limit's rates.

        ``tokens``: in one run of a side; ``steps``: parts that its time is divided by.
        """
        built = {side.key: side.built() for side in sides}
        seconds, rates = _in_turn(sides, built, self.limit, self.clock, warm=seq_len <= WARM_UP)
        # What they hold is large, and the fresh processes want the memory.
        told = {key: made._replace(run=_nothing) for key, made in built.items()}
        del built
        gc.collect()
        timed = _Timed(seq_len, tokens, steps, seconds, statistics.median(rates))
        rows = []
        for side in sides:
            peaks = peak_bytes(side) if self.memory else {}
            for pass_ in seconds[side.key]:
                rows.append(timed.row(self.what, side, pass_, told[side.key], peaks.get(pass_)))
                self.report(rows[-1])
        return rows, rates


def _nothing() -> Iterator[str]:
    return iter(())


class _Timed(NamedTuple):
    """What all sides took at one length."""

    seq_len: int
    tokens: int
    steps: int
    seconds: dict[str, dict[str, list[float]]]
    """By side and pass."""
    rate: float
    """The limit's."""

    def row(
        self, what: str, side: Side, pass_: str, built: Built, peak: tuple[int, int] | None
    ) -> Row:
        own = self.seconds[side.key][pass_]
        low, middle, high = quartiles([1e3 * t / self.steps for t in own])
        typical = statistics.median(own)
        ratios = {
            other: round(statistics.median(times[pass_]) / typical, 3)
            for other, times in self.seconds.items()
            if other != side.key and pass_ in times
        }
        work = built.work.get(pass_)
        beyond, in_all = (round(n / 1e6, 1) for n in peak) if peak else (None, None)
        return Row(
            what, side.name, self.seq_len, pass_, round(middle, 3), (round(low, 3), round(high, 3)),
            len(own), round(self.tokens / typical, 1), beyond, ratios,
            round(work / typical / self.rate, 4) if work else None,
            {**side.facts, **built.facts} | ({"process_mb": in_all} if in_all else {}),
        )  # fmt: skip


T = TypeVar("T")


def numbers(text: str) -> list[int]:
    """The type of an option such as ``--lengths 512,1024``.

    Raises:
        argparse.ArgumentTypeError: something that is no whole number.
    """
    return _parts(text, int)


def fractions(text: str) -> list[float]:
    """The type of an option such as ``--shares 0.125,0.25``.

    Raises:
        argparse.ArgumentTypeError: something that is no number.
    """
    return _parts(text, float)


def _parts(text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from error


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; one value is all three."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _in_turn(
    sides: Sequence[Side],
    built: dict[str, Built],
    limit: Callable[[Callable[[], float]], float],
    clock: Callable[[], float],
    warm: bool,
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Seconds by side and pass, and the limit's rate before each round and at the end."""
    for side in sides if warm else ():
        for _ in built[side.key].run():
            pass
    seconds: dict[str, dict[str, list[float]]] = {side.key: {} for side in sides}
    rates = []
    for number in range(max(side.repeats for side in sides)):
        rates.append(limit(clock))
        for side in sides:
            if number < side.repeats:
                begin = clock()
                for pass_ in built[side.key].run():
                    seconds[side.key].setdefault(pass_, []).append(clock() - begin)
    rates.append(limit(clock))
    return seconds, rates


def peak_bytes(side: Side) -> dict[str, tuple[int, int]]:
    """What each pass of ``side`` needs at most, in a fresh process: beyond what is there before,
    and the process in all.

    Empty, with a word on standard error, if the process failed, by being short of memory, say.
    """
    order = json.dumps(dataclasses.asdict(side))
    program = "import sys; from vqlm import timing; timing.report_peaks(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", program, order, str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        print(f"note: no peak memory of {side.key}: its process failed ({reason})", file=sys.stderr)
        return {}
    peaks = json.loads(run.stdout.splitlines()[-1])
    return {pass_: (beyond, in_all) for pass_, (beyond, in_all) in peaks.items()}


def report_peaks(order: str, n_thread: str) -> None:
    """What the fresh process does: builds the side, runs it once, prints its peaks as JSON."""
    torch.set_num_threads(int(n_thread))
    built = Side(**json.loads(order)).built()
    gc.collect()
    # What has been freed and is kept for later would hide what is needed; not every C library
    # can give it back.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _start_of_peak()
    peaks = {pass_: _peak() for pass_ in built.run()}
    print(json.dumps({pass_: (max(0, peak - before), peak) for pass_, peak in peaks.items()}))


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _start_of_peak() -> int:
    """Bytes in use now; from here on ``_peak`` counts, where the system lets it begin anew."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return _peak()
    return _from_status("VmRSS")


def _peak() -> int:
    """Most bytes that this process has had in use."""
    if _STATUS.exists():
        # Not getrusage: what that says begins with the size of the process that started this one.
        return _from_status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _from_status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def line(row: Row, peer: str | None = None) -> str:
    """One row as text, with its ratio against ``peer``."""
    low, high = row.ms_spread
    shown = " ".join(f"{k}={row.facts[k]}" for k in ("block",) if k in row.facts)
    parts = [
        f"{row.mixer + ' ' + shown:15}{row.seq_len:7} tokens  {row.pass_:17}"
        f"{row.ms_median:11.2f} ms ({low:.2f} to {high:.2f}, {row.repeats}x)"
        f"{row.tokens_per_s:10,.0f} tokens/s"
    ]
    if row.share_of_limit is not None:
        parts.append(f"{100 * row.share_of_limit:3.0f}% of limit")
    if row.peak_mb is not None:
        parts.append(f"{row.peak_mb:,.0f} MB")
    parts += [f"{x:.2f}x {name}" for name, x in row.ratio_vs.items() if peer in (None, name)]
    return "  ".join(parts)


def machine() -> dict[str, Any]:
    """What a time depends on beside the program: device, threads, torch, and the date."""
    name = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{name} CPU ({capability}), {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
