"""Prepared data: a folder of token files that are mapped, not loaded, and a manifest of them.

    FOLDER/manifest.json        what is in it, with the size and sha256 of every file
    FOLDER/train.tokens.bin     uint16 little-endian, all documents end to end
    FOLDER/train.offsets.bin    int64 little-endian, [n_documents + 1] where each begins
    (the same for validation and test)
    FOLDER/vocabulary.model     SentencePiece's model; not there where tokens are bytes

A folder is written under another name, synced, and renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import UInt16
from numpy.typing import NDArray

from vqlm import durable
from vqlm.data import Corpus, Split, load_corpus
from vqlm.untrusted import read_json
from vqlm.vocabulary import END, MODEL_FILE, Vocabulary, load_vocabulary

MANIFEST = "manifest.json"
FORMAT, VERSION = "vqlm-prepared", 1
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

_BLOCK = 1 << 22
_KEYS = {"name": str, "kind": str, "vocabulary": dict, "splits": dict, "files": dict}
_COUNTS = ("n_tokens", "n_documents", "n_bytes")
_MARGIN = 64 << 20  # bytes of disk to leave free


def open_corpus(source: str | Path | None) -> Corpus:
    """The corpus of `source`: a prepared folder by memory map, anything else by `load_corpus`.

    A prepared folder is one whose manifest.json says so, or which has token files.

    Raises ValueError for a prepared folder that is damaged (sizes and document borders are checked;
    `verify` checks contents as well) or of an unknown version, and what `load_corpus` raises.
    """
    if source is None:
        return load_corpus(None)
    folder = Path(source).expanduser()
    return _open(folder) if _is_prepared(folder) else load_corpus(folder)


def verify(folder: Path) -> int:
    """Reads every file of a prepared folder and compares its sha256; returns the bytes read.

    Raises ValueError naming the first damaged file, FileNotFoundError where no prepared folder is,
    and what `open_corpus` raises.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} is no prepared folder: it has no {MANIFEST}; vqlm data prepare makes one"
        )
    _open(folder)
    total = 0
    for name, facts in _read_manifest(folder)["files"].items():
        if (got := sha256_of(folder / name)) != facts["sha256"]:
            raise ValueError(
                f"{folder / name} is damaged: its sha256 is {got}, the manifest says "
                f"{facts['sha256']}; prepare the data again"
            )
        total += facts["size"]
    return total


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_prepared(folder: Path) -> bool:
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        marked = FORMAT.encode() in file.read(4096)
    return marked or any(folder.glob("*.tokens.bin"))


def _open(folder: Path) -> Corpus:
    manifest = _read_manifest(folder)
    vocabulary = load_vocabulary(folder)
    want = manifest["vocabulary"]
    if want != {"kind": vocabulary.kind, "size": vocabulary.size}:
        raise _damaged(
            folder, f"its vocabulary is {vocabulary.kind} of {vocabulary.size} ids, not {want}"
        )
    train, validation, test = (
        _open_split(folder, name, manifest["splits"][name], vocabulary) for name in SPLITS
    )
    shape = manifest.get("picture_shape")
    if shape is not None:
        lengths = np.concatenate([np.diff(s.document_offsets) for s in (train, validation, test)])
        if np.any(lengths != math.prod(shape)):
            raise _damaged(folder, f"it has pictures of another size than {shape}")
    # Only what decides the tokens: not the name, nor where the sources were.
    decisive = {key: manifest[key] for key in ("kind", "vocabulary", "splits", "files")}
    fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return Corpus(
        train, validation, test, manifest["name"], fingerprint, manifest["kind"],
        tuple(shape) if shape else None,
    )  # fmt: skip


def _open_split(folder: Path, name: str, facts: dict[str, Any], vocabulary: Vocabulary) -> Split:
    arrays = []
    wanted = ("tokens", "<u2", facts["n_tokens"]), ("offsets", "<i8", facts["n_documents"] + 1)
    for part, dtype, n in wanted:
        path = folder / f"{name}.{part}.bin"
        if path.stat().st_size != n * np.dtype(dtype).itemsize:
            raise _damaged(folder, f"{path.name} is not of {n} numbers")
        # A plain array over the map: memmap's own class would cling to every batch.
        arrays.append(np.asarray(np.memmap(path, dtype, "r")))
    tokens, offsets = arrays
    if offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(np.diff(offsets) <= 0):
        raise _damaged(folder, f"{name}.offsets.bin has borders of documents out of order")
    return Split(
        tokens, offsets, (), facts["has_ends"], vocabulary, facts["n_words"], facts["n_bytes"]
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every field that is used later checked, and all files' sizes."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise _damaged(folder, str(error)) from error
    if manifest.get("format") != FORMAT:
        raise _damaged(folder, f"{MANIFEST} does not say format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder}: format version {manifest.get('version')!r}, this vqlm reads {VERSION}; "
            "prepare the data again, or use the vqlm that wrote it"
        )
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise _damaged(folder, f"{MANIFEST} has no {key!r}")
    _check_splits(folder, manifest)
    for name, facts in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != facts["size"]:
            raise _damaged(folder, f"{name} has {size} bytes, wanted {facts['size']}")
    return manifest


def _check_splits(folder: Path, manifest: dict[str, Any]) -> None:
    shape = manifest.get("picture_shape")
    text = manifest["kind"] == "text" and shape is None
    if not text and not (manifest["kind"] == "image" and _is_shape(shape)):
        got = manifest["kind"]
        raise _damaged(folder, f"kind {got!r} with picture_shape {shape!r} is unknown")
    for name in SPLITS:
        facts = manifest["splits"].get(name)
        if not isinstance(facts, dict) or not all(_is_count(facts.get(c)) for c in _COUNTS):
            raise _damaged(folder, f"{MANIFEST} has no counts of split {name!r}")
        words = facts.get("n_words", 0)
        if not isinstance(facts.get("has_ends"), bool) or not (words is None or _is_count(words)):
            raise _damaged(folder, f"{MANIFEST}: split {name!r} lacks has_ends or n_words")
    wanted = {f"{name}.{part}.bin" for name in SPLITS for part in ("tokens", "offsets")}
    if manifest["vocabulary"].get("kind") == "sentencepiece":
        wanted.add(MODEL_FILE)
    listed = manifest["files"]
    # The names are fixed, so no manifest can point outside its folder.
    if listed.keys() != wanted or not all(_is_file_entry(entry) for entry in listed.values()):
        raise _damaged(folder, f"{MANIFEST} does not list {', '.join(sorted(wanted))}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 62


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


def _is_file_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and _is_count(entry.get("size"))
        and isinstance(entry.get("sha256"), str)
    )


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder} is damaged prepared data: {what}; prepare the data again")


class _Output:
    """One file being written, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = open(path, "wb", buffering=_BLOCK)
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def finish(self) -> dict[str, Any]:
        """Makes it durable; returns its entry in the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        try:
            self._file.close()
        except OSError:  # what was buffered finds no room either
            pass


class _TooLittleSpace(OSError):
    """Told before anything is written."""


class PreparedWriter:
    """Writes a prepared folder; until `publish` has returned there is none.

        with PreparedWriter(folder, "name", vocabulary) as writer:
            writer.add("train", tokens)    # one document; or write, write, ..., end_document
            writer.publish(sources)

    Leaving the block without `publish`, by an error or Ctrl-C, removes what was written.  What a
    killed process left behind is removed by the next writer of the same folder.

    Args:
        folder: where it is to be; must not exist, or be empty.
        name: of the corpus, for logs.
        vocabulary: what the tokens stand for.
        has_ends: whether END follows each document.
        picture_shape: (height, width, 3) of pictures; None: text.

    Raises ValueError when `folder` has something in it, or when another process is writing it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        vocabulary: Vocabulary,
        *,
        has_ends: bool = True,
        picture_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.folder = folder.expanduser().absolute()
        self.name, self.vocabulary = name, vocabulary
        self.has_ends, self.picture_shape = has_ends, picture_shape
        self.counts: dict[SplitName, dict[str, Any]] = {
            s: {"n_tokens": 0, "n_documents": 0, "n_bytes": 0, "n_words": None} for s in SPLITS
        }
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._outputs: dict[str, _Output] = {}
        self._open_document: dict[SplitName, bool] = dict.fromkeys(SPLITS, False)

    def __enter__(self) -> PreparedWriter:
        refuse_occupied(self.folder)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._partial / "lock", "wb")
        try:
            _lock_or_refuse(self._lock, self._partial)
            for left_over in self._partial.iterdir():
                if left_over.name != "lock":
                    left_over.unlink()
        except BaseException:
            self._lock.close()
            raise
        for split in SPLITS:
            for part in ("tokens", "offsets"):
                name = f"{split}.{part}.bin"
                self._outputs[name] = _Output(self._partial / name)
            self._outputs[f"{split}.offsets.bin"].write(_offset(0))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for output in self._outputs.values():
            output.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)  # renamed away where all went well
        self._lock.close()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full and not isinstance(error, _TooLittleSpace):
            raise OSError(f"{self.folder}: the disk filled up; nothing was prepared") from error

    def require_space(self, n_bytes: int) -> None:
        """Raises OSError, before hours of work, if the disk has no room for n_bytes more."""
        free = shutil.disk_usage(self._partial).free
        if free < n_bytes + _MARGIN:
            raise _TooLittleSpace(
                errno.ENOSPC,
                f"{self.folder} needs about {n_bytes / 1e9:.1f} GB more, its disk has "
                f"{free / 1e9:.1f} GB free; free some, or choose another disk",
            )

    def write(self, split: SplitName, tokens: UInt16[np.ndarray, " n"]) -> None:
        """Goes on with the document of `split` that is being written, or begins one."""
        counts = self.counts[split]
        self._outputs[f"{split}.tokens.bin"].write(tokens.astype("<u2", copy=False).tobytes())
        counts["n_tokens"] += len(tokens)
        counts["n_bytes"] += int(self.vocabulary.token_bytes[tokens].sum())
        self._open_document[split] |= len(tokens) > 0

    def end_document(self, split: SplitName, n_words: int | None = None) -> None:
        """Ends the document with END, where there are ends; n_words are added to the split's.

        Raises ValueError for an empty document.
        """
        if not self._open_document[split]:
            raise ValueError(f"PreparedWriter: an empty document in split {split!r}")
        counts = self.counts[split]
        if self.has_ends:
            self.write(split, np.array([END], np.uint16))
        counts["n_documents"] += 1
        if n_words is not None:
            counts["n_words"] = (counts["n_words"] or 0) + n_words
        self._outputs[f"{split}.offsets.bin"].write(_offset(counts["n_tokens"]))
        self._open_document[split] = False

    def add(self, split: SplitName, tokens: NDArray[np.uint16], n_words: int | None = None) -> None:
        """Writes a whole document."""
        self.write(split, tokens)
        self.end_document(split, n_words)

    def publish(self, sources: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes the folder appear, complete; returns its manifest.

        Args:
            sources: what it was made from: name, size and sha256 of each file.

        Raises ValueError for a split without documents or with one not ended; OSError when the
        folder cannot be written, or has been taken meanwhile.
        """
        for split, counts in self.counts.items():
            if not counts["n_documents"] or self._open_document[split]:
                raise ValueError(
                    f"PreparedWriter: split {split!r} has {counts['n_documents']} complete "
                    "documents, wanted one or more and none begun; give more data"
                )
        files = {name: output.finish() for name, output in self._outputs.items()}
        self.vocabulary.save(self._partial)
        if (model := self._partial / MODEL_FILE).exists():
            files[MODEL_FILE] = {"size": model.stat().st_size, "sha256": sha256_of(model)}
            durable.sync(model)
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": self.name}
        manifest["kind"] = "image" if self.picture_shape else "text"
        manifest["picture_shape"] = list(self.picture_shape) if self.picture_shape else None
        manifest["vocabulary"] = {"kind": self.vocabulary.kind, "size": self.vocabulary.size}
        manifest["splits"] = {s: {**c, "has_ends": self.has_ends} for s, c in self.counts.items()}
        manifest |= {"files": files, "sources": sources}
        output = _Output(self._partial / MANIFEST)
        self._outputs[MANIFEST] = output
        output.write(json.dumps(manifest, indent=1).encode() + b"\n")
        output.finish()
        durable.sync(self._partial)
        os.rename(self._partial, self.folder)  # also onto an empty folder, never onto a full one
        (self.folder / "lock").unlink()  # not before: another process could begin in between
        durable.sync(self.folder.parent)
        return manifest


def refuse_occupied(folder: Path) -> None:
    """Raises ValueError unless a folder can be made, or is there and empty, at `folder`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is a file or a link; choose a folder that does not exist")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another, or remove it first")


def require_place(file: Path) -> None:
    """Raises ValueError unless `file` is one, or could be made, in a folder that is there."""
    if not file.parent.is_dir():
        raise ValueError(f"{file}: {file.parent} is no folder; make it, or choose another")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file in it")


def _lock_or_refuse(file: IO[bytes], partial: Path) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is preparing data in {partial}; wait for it") from error


def _offset(value: int) -> bytes:
    return value.to_bytes(8, "little")
