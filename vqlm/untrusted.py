"""Files from strangers: what is opened, and how much of it, is decided before anything is read.

Of a run folder only JSON, safetensors and SentencePiece models are read, none of which can run
code.  What is left to a stranger is to have another file read or written than is meant (links,
names with dots, pipes and devices), or more memory asked for than there is.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MOST_JSON = 1 << 24
"""Bytes of a JSON file."""

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLED = ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "trainer.pt")


def machine_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(n_bytes: int, what: object) -> None:
    """Nothing, if the machine could hold so much.

    Raises:
        ValueError: it could not.
    """
    if n_bytes > machine_bytes():
        raise ValueError(
            f"{what} wants {n_bytes / 1e9:,.1f} GB of memory, and this machine has "
            f"{machine_bytes() / 1e9:,.1f} GB; a damaged file, or one for a larger machine"
        )


def require_own_file(path: Path) -> None:
    """Nothing, if ``path`` is a plain file in its folder, or a link to another in there.

    The cache of the Hugging Face hub keeps files in ``blobs`` and links to them; those are let
    through.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a link that leads outside, a pipe, a device or a folder.
    """
    folder, target = path.parent.resolve(), path.resolve()
    in_hub = target.parent.name == "blobs" and folder.is_relative_to(target.parent.parent)
    if path.is_symlink() and not (target.is_relative_to(folder) or in_hub):
        raise ValueError(f"{path} is a link that leads outside, to {target}; copy what it means")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no plain file; a run folder holds nothing else")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """All of a file, if it has ``most`` bytes at most; None: as many as the machine can hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is larger, or not a file of its own (``require_own_file``).
    """
    require_own_file(path)
    size = path.stat().st_size
    if most is not None and size > most:
        raise ValueError(f"{path} has {size:,} bytes, wanted {most:,} at most; it is damaged")
    require_memory(size, path)
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, another thing than an object, or what ``read_bytes`` refuses.
    """
    content = read_bytes(path, MOST_JSON)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, wanted an object")
    return found


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone.

    safetensors has checked by then that the file is as long as the shapes say.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors file; of a pickle the message says so.
    """
    require_own_file(path)
    try:
        with safe_open(path, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OverflowError) as problem:
        error = str(problem)
        with open(path, "rb") as file:
            if file.read(4).startswith(_PICKLES):
                error = "it is a pickle, which could run any code, and was not opened"
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def require_plain_names(names: Iterable[object], source: Path) -> list[str]:
    """``names``, if each is the name of a file beside ``source``, which names them.

    Raises:
        ValueError: one has folders or dots that lead elsewhere.
    """
    plain: list[str] = []
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or "\0" in name or "\\" in name:
            raise ValueError(f"{source} names {name!r}, which is no file beside it; it is refused")
        plain.append(name)
    return plain


def require_no_pickle_instead(folder: Path) -> None:
    """Nothing, unless ``folder`` has weights only in a form that could run code.

    Raises:
        ValueError: it has.
    """
    for name in _PICKLED:
        if (folder / name).exists() and not any(folder.glob("*.safetensors*")):
            raise ValueError(
                f"{folder / name} is a pickle, which could run any code, and is never opened; ask "
                "for model.safetensors"
            )


def require_no_links(run: Path) -> None:
    """Nothing, if all that a training would write to in ``run`` is in ``run``.

    Raises:
        ValueError: a link, pipe or device is among it.
    """
    for parent, folders, files in os.walk(run):
        for name in (*folders, *files):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another training is at work, and will be noticed
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(
                    f"{path} is a link or no plain file, and training writes to this folder; "
                    "remove it, or put what it means in its place"
                )
