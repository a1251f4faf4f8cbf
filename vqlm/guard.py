"""What guards a training: signals that end it in good order, and a lock on its run folder."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from vqlm.untrusted import require_no_links

LOCK = ".lock"
"""The file in a run folder that a training holds."""

_SECOND: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[int], object]) -> Iterator[None]:
    """Calls ``stop`` with the number of the first SIGINT (Ctrl-C) or SIGTERM (a scheduler wants its
    machine back); a second one of the kind ends the program at once.

    Outside the main thread, where there are no signals to catch, it does nothing.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, _SECOND[signal.Signals(number)])
        stop(number)

    before = {}
    try:
        for number in _SECOND:
            before[number] = signal.signal(number, on_signal)
    except ValueError:
        assert not before
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder, which the system takes back when the process ends.

    Raises:
        ValueError: another process holds it, or there is a link in the folder.
    """
    require_no_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"another training is writing to {folder}; wait for its end, or choose another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()
