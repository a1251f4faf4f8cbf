"""Saving beside the training: in a thread of its own, from copies, one save at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which no later step changes."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


class Saver:
    """Does one save at a time; what it is given must not change any more (``copied``).

    A save that fails is told of at the next ``start`` or ``finish``, since nobody waits for it.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[object] | None = None

    def start(self, save: Callable[[], object]) -> None:
        """Has ``save`` called after the save before it, for which this waits.

        Raises:
            OSError: the one before could not be written; this one is under way all the same.
        """
        failure = self.finish()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="vqlm-save")
        self._under_way = self._thread.submit(save)
        if failure is not None:
            raise failure

    def finish(self) -> OSError | None:
        """Waits for the save under way, if any; returns why it could not be written."""
        under_way, self._under_way = self._under_way, None
        try:
            if under_way is not None:
                under_way.result()
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Waits for the save under way and ends the thread; a later ``start`` makes another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
