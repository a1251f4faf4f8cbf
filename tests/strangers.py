"""What a stranger may send, and little memory to read it with."""

import io
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Pickled, it leaves a file behind when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickles(mark: Path) -> dict[str, bytes]:
    zipped = io.BytesIO()
    torch.save({"norm.gain": Bomb(mark)}, zipped)
    plain = [pickle.dumps(Bomb(mark), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    return {"zip": zipped.getvalue(), **{f"protocol {i}": x for i, x in enumerate(plain)}}


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """So many bytes, beyond what this process has mapped already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
