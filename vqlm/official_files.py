"""Reading the files that official checkpoints come in, into arrays by flat name; nothing is run.

A flat name joins the path of a leaf with slashes: ``transformer_layers_0/scanned_attn1/u``.
flax, msgpack and orbax (the extra ``official``) are imported where they are used: 3 seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqlm.untrusted import read_bytes, require_memory

WANTED = (
    "wanted a .npz of flat names, a flax msgpack file, or the folder of one orbax checkpoint (the "
    "folder with _METADATA in it, or the one above)"
)

_PREFIXES = ("param/", "params/")
# Folders of one item, where a checkpoint has several; the first that is there is read.
_ITEMS = ("params", "state", "default")
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")


def read_official(path: Path) -> dict[str, NDArray[Any]]:
    """Parameters of an official checkpoint, by flat name, in the shapes and types they have there.

    The kind is told by content, not by suffix:

    - ``.npz`` of flat names; if some begin with ``param/`` or ``params/``, only those are taken,
      without it.
    - A flax msgpack file (``flax.serialization.to_bytes``).
    - An orbax folder of either storage format, its structure in ``_METADATA`` or (older) in
      ``checkpoint``; or a folder above it with an item ``params``, ``state`` or ``default``.  Only
      the parameters are read from the disk; no device or sharding of the writer is needed.

    The last two hold trees.  What lies under the key ``params`` (again and again, as long as there
    is one) is taken, as in a train state; without that key, the whole tree.  bfloat16, which NumPy
    lacks, becomes float32, which is exact; other float types are kept.

    Raises:
        FileNotFoundError: there is no ``path``.
        ValueError: a damaged or unknown file, a leaf that is no array of numbers, or flax or orbax
            not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {WANTED}")
    if path.is_dir():
        tree = _read_orbax(path)
    else:
        with path.open("rb") as file:
            start = file.read(4)
        tree = _read_npz(path) if start in _ZIP_STARTS else _read_msgpack(path, start)
    arrays: dict[str, NDArray[Any]] = {}
    for name, leaf in _flatten(_parameters(tree)[1]):
        if name in arrays:
            raise ValueError(f"{path}: two leaves are called {name!r}")
        arrays[name] = _array(path, name, leaf)
    if not arrays:
        raise ValueError(f"{path} holds no parameters; {WANTED}")
    return arrays


def _parameters(tree: Any) -> tuple[int, Any]:
    """How many keys ``params`` lead to the parameters, and the parameters."""
    depth = 0
    while isinstance(tree, dict) and isinstance(tree.get("params"), dict):
        tree, depth = tree["params"], depth + 1
    return depth, tree


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    children = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
    if isinstance(children, dict):
        for key, child in children.items():
            yield from _flatten(child, (*path, str(key)))
    else:
        yield "/".join(path), tree


def _array(path: Path, name: str, leaf: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(leaf)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: {name!r} is of type {array.dtype}, not an array of numbers; {WANTED}"
        )
    return array


@contextlib.contextmanager
def _as_value_errors(path: Path, kind: str) -> Iterator[None]:
    """Whatever a foreign reader stumbles over becomes a ``ValueError`` that names the file."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{path} is {kind}; to read it: pip install 'vqlm[official]' ({error})"
        ) from error
    except MemoryError:
        raise
    # The readers' ways to fail are many and not documented: struct.error, zlib.error, KeyError...
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path}: damaged, or not {kind} ({cause}); {WANTED}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    with _as_value_errors(path, "a .npz of arrays"):
        with zipfile.ZipFile(path) as archive:
            total = sum(_array_bytes(archive, entry) for entry in archive.infolist())
        require_memory(total, path)
        with np.load(path, allow_pickle=False) as arrays:
            for prefix in _PREFIXES:
                if names := [name for name in arrays.files if name.startswith(prefix)]:
                    return {name.removeprefix(prefix): arrays[name] for name in names}
            return {name: arrays[name] for name in arrays.files}


def _array_bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Bytes of an array in an archive, if its header and the archive agree about them.

    NumPy would make room for whatever shape the header declares, before it reads on.
    """
    if not entry.filename.endswith(".npy"):
        raise ValueError(f"it holds {entry.filename!r}")
    with archive.open(entry) as file:
        major = np.lib.format.read_magic(file)[0]
        if major not in (1, 2):
            raise ValueError(f"{entry.filename} has format version {major}, wanted 1 or 2")
        read = np.lib.format.read_array_header_1_0
        shape, _, dtype = (read if major == 1 else np.lib.format.read_array_header_2_0)(file)
        declared = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or declared + file.tell() != entry.file_size:
            raise ValueError(
                f"{entry.filename} declares {dtype} {shape}, and has {entry.file_size} bytes"
            )
    return declared


def _read_msgpack(path: Path, start: bytes) -> dict[str, Any]:
    # A msgpack file of a tree begins with one of the codes for a map.
    if not start or not (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        raise ValueError(f"{path}: unknown file, it begins with {start!r}; {WANTED}")
    with _as_value_errors(path, "a flax msgpack file"):
        from flax import serialization

        tree = serialization.msgpack_restore(read_bytes(path))
        assert isinstance(tree, dict)
        return tree


def _read_orbax(folder: Path) -> Any:
    item = _item(folder)
    # It refuses relative paths.
    absolute = item.resolve()
    with _as_value_errors(item, "an orbax checkpoint"), _quiet_absl():
        import jax
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            structure = _structure(checkpointer, absolute)
            leaves = (getattr(leaf, "shape", ()) or () for leaf in jax.tree.leaves(structure))
            require_memory(sum(8 * math.prod(shape) for shape in leaves), folder)
            depth, wanted = _parameters(structure)
            for _ in range(depth):
                wanted = {"params": wanted}
            # As NumPy arrays: else orbax looks for the devices that wrote the file.
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            # `transforms={}` is its way to say: read the leaves of `item` and no others.
            return checkpointer.restore(
                absolute, item=jax.tree.map(lambda _: 0, wanted), restore_args=how, transforms={}
            )


def _structure(checkpointer: Any, folder: Path) -> Any:
    """The tree of a checkpoint, with anything as leaves."""
    if (folder / "_METADATA").is_file():
        metadata = checkpointer.metadata(folder).item_metadata
        if metadata is None:  # what it answers when anything that it needs cannot be read
            raise ValueError("orbax finds no tree in it")
        return metadata.tree
    from flax import serialization

    return serialization.msgpack_restore((folder / "checkpoint").read_bytes())


def _item(folder: Path) -> Path:
    for candidate in (folder, *(folder / name for name in _ITEMS)):
        if any((candidate / name).is_file() for name in ("_METADATA", "checkpoint")):
            return candidate
    inside = sorted(child.name for child in folder.iterdir())[:5]
    raise ValueError(
        f"{folder} is no orbax checkpoint (it holds {', '.join(inside) or 'nothing'}); {WANTED}. "
        "Of a folder of several checkpoints, give one"
    )


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """orbax logs warnings about how it will change; they tell a user of ours nothing."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
