"""Files and folders that are there whole or not at all, whenever the machine stops."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A new folder to write into; it becomes ``final`` if all goes well, and is gone otherwise."""
    partial = final.with_name(f".{final.name}.partial")
    replaced = final.with_name(f".{final.name}.replaced")
    if replaced.exists() and not final.exists():  # stopped between the two renames below
        replaced.rename(final)
    for left_over in (partial, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        sync(final.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write(path: Path, content: bytes) -> None:
    """Writes a file, and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a folder's names, or a file, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(source: Path, target: Path) -> None:
    """Makes ``target`` what ``source`` is, in one step, whatever it was before.

    Weights may be large and get a second link; the rest is copied, since whoever writes into a
    file that is linked writes into its other name too.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    linked = False
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(source, partial)
            linked = True
    if not linked:
        shutil.copyfile(source, partial)
        sync(partial)
    os.replace(partial, target)
    partial.unlink(missing_ok=True)  # renaming one of two links to a file does nothing
