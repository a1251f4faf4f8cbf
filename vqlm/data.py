"""Text as bytes: corpora, contiguous training lanes, and batches that cover a split exactly once.

Token ids: 0 padding, 1 end of document, 2 unknown (no byte is), byte b is b + 3.  A document
d0 d1 ... dn is stored as d0 d1 ... dn END.  Targets are those tokens; inputs are the targets one
step late, so the first input of every document is END, which is thus the start symbol as well.

    load_corpus -> Corpus of three Splits -> Lanes (training) | evaluation_batches -> Batch

Axes: B batch (one row is one stream of text), T time.
"""

import difflib
import hashlib
import heapq
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAD, END, UNKNOWN, N_SPECIAL = 0, 1, 2, 3
VOCAB_SIZE = N_SPECIAL + 256

_NOT_STDLIB_SOURCE = frozenset(
    ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"]
)
_BINARY_CHECK_BYTES = 8192

# The inputs and the targets of one row of evaluation batches.
_Row = tuple[NDArray[np.uint16], NDArray[np.uint16]]


def encode(text: bytes) -> NDArray[np.uint16]:
    """Token ids uint16 [len(text)] of a byte string; no END is added."""
    return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(N_SPECIAL)


def decode(ids: NDArray[np.integer] | Sequence[int]) -> bytes:
    """The byte string of token ids (any integer dtype, one axis); special ids are dropped.

    Raises ValueError for ids outside [0, VOCAB_SIZE).
    """
    array = np.asarray(ids, dtype=np.uint16 if len(ids) == 0 else None)
    if array.size and not 0 <= array.min() <= array.max() < VOCAB_SIZE:
        raise ValueError(
            f"decode: got ids from {array.min()} to {array.max()}, wanted 0 to {VOCAB_SIZE - 1}; "
            "they come from another vocabulary"
        )
    return (array[array >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()


@dataclass(frozen=True, eq=False)
class Split:
    """Documents end to end."""

    tokens: NDArray[np.uint16]
    """[n_tokens] the documents' tokens, each document followed by END."""
    document_offsets: NDArray[np.int64]
    """[n_documents + 1] document i is tokens[document_offsets[i] : document_offsets[i + 1]]."""
    names: tuple[str, ...]
    """One name for each document: its path relative to the corpus's folder, with `/`."""

    @classmethod
    def from_documents(
        cls, documents: Sequence[bytes | NDArray[np.uint8]], names: Sequence[str] | None = None
    ) -> "Split":
        """A split of byte strings, named 0, 1, ... when `names` is None.

        Raises ValueError for no documents, an empty document, or a number of names which is not
        the number of documents.
        """
        names = [str(i) for i in range(len(documents))] if names is None else names
        if not documents or len(names) != len(documents) or not all(map(len, documents)):
            raise ValueError(
                f"Split: got {len(documents)} documents of {[len(d) for d in documents[:8]]}... "
                f"bytes with {len(names)} names; wanted one or more documents, none of them empty, "
                "each with one name"
            )
        offsets = np.cumsum([0] + [len(document) + 1 for document in documents], dtype=np.int64)
        tokens = np.full(offsets[-1], END, np.uint16)
        for document, start in zip(documents, offsets, strict=False):
            tokens[start : start + len(document)] = encode(bytes(document))
        return cls(tokens, offsets, tuple(names))

    @property
    def n_documents(self) -> int:
        return len(self.names)

    @property
    def n_bytes(self) -> int:
        """Number of text bytes; the END after each document is not counted."""
        return len(self.tokens) - self.n_documents

    def text(self) -> bytes:
        """All documents concatenated, nothing between them: what a compressor is given."""
        return decode(self.tokens)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three splits of one source of text."""

    train: Split
    validation: Split
    test: Split
    name: str
    """What was loaded, for logs: the file's or folder's name, or `stdlib-` and Python's version."""
    fingerprint: str
    """sha256 (hex) over document names and contents: a resumed run can notice changed data."""


def load_corpus(source: str | Path | None) -> Corpus:
    """Load text and split it about 90/5/5 by bytes into train, validation and test.

    - None: the source text of the running Python's standard library (tests and installed packages
      left out; about 12 MB for CPython 3.11), one document for each file, split by whole files.
    - a file: its bytes, cut in order, as is the custom for enwik8; each split is one document.
    - a folder: every regular file below it is a document; split by whole files.  Left out are
      hidden files and folders, symbolic links (they would put one text in two splits, or lead
      outside), empty files, and binary files (a NUL byte in the first 8 KiB).

    Whole files are ordered by the sha256 of their relative name, so that topics mix, yet the same
    files always give the same splits.

    Raises FileNotFoundError when `source` does not exist; ValueError when a file cannot be read,
    or when there is too little text to split: a file of under 20 bytes, a folder of under 3 files.
    """
    if source is None:
        root = Path(sysconfig.get_path("stdlib"))
        return _load_folder(root, f"stdlib-{platform.python_version()}", _NOT_STDLIB_SOURCE, ".py")
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, path.resolve().name, frozenset(), "")
    if path.is_file():
        return _load_file(path)
    if path.exists():
        raise ValueError(f"load_corpus: {path} is neither a regular file nor a folder")
    raise FileNotFoundError(_describe_missing(path))


def _load_file(path: Path) -> Corpus:
    text = _read(path)
    n = len(text)
    if n < 20:
        raise ValueError(
            f"load_corpus: {path} has {n} bytes, wanted at least 20 to split it 90/5/5; "
            "give a longer file, or None for the Python standard library's source"
        )
    parts = np.split(text, [n * 90 // 100, n * 95 // 100])
    return _corpus(path.name, *(Split.from_documents([part], [path.name]) for part in parts))


def _load_folder(root: Path, name: str, skipped_folders: frozenset[str], suffix: str) -> Corpus:
    texts: dict[str, NDArray[np.uint8]] = {}
    for relative in _walk(root, skipped_folders, suffix):
        head = _read(root / relative, _BINARY_CHECK_BYTES)
        if len(head) and head.all():
            texts[relative] = _read(root / relative)
    if len(texts) < 3:
        raise ValueError(
            f"load_corpus: {root} has {len(texts)} text files, wanted at least 3 to split by whole "
            "files (hidden, empty and binary files and symbolic links do not count); give a single "
            "file, which is split by bytes"
        )
    names = sorted(texts, key=lambda relative: _sha256(os.fsencode(relative)))
    ends = np.cumsum([len(texts[relative]) for relative in names])
    middles = ends - np.diff(ends, prepend=0) / 2
    # A file goes where its middle falls; the clamps keep at least one file for each split.
    cuts = np.searchsorted(middles, [ends[-1] * 0.90, ends[-1] * 0.95])
    first = min(int(cuts[0]), len(names) - 2)
    second = min(max(int(cuts[1]), first + 1), len(names) - 1)
    parts = names[:first], names[first:second], names[second:]
    return _corpus(name, *(Split.from_documents([texts[n] for n in p], p) for p in parts))


def _walk(root: Path, skipped_folders: frozenset[str], suffix: str) -> Iterator[str]:
    """Names, relative to `root` and with `/`, of the files below it that may be documents."""

    for folder, subfolders, files in os.walk(root, onerror=_refuse):
        subfolders[:] = [s for s in subfolders if s[0] != "." and s not in skipped_folders]
        for file in files:
            path = Path(folder, file)
            wanted = file[0] != "." and file.endswith(suffix)
            if wanted and path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _read(path: Path, max_bytes: int = -1) -> NDArray[np.uint8]:
    try:
        return np.fromfile(path, np.uint8, count=max_bytes)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(
        f"load_corpus: cannot read {error.filename} ({error.strerror}); make it readable, or move "
        "it away"
    ) from error


def _corpus(name: str, train: Split, validation: Split, test: Split) -> Corpus:
    parts = [
        part
        for split in (train, validation, test)
        for part in (
            os.fsencode("\n".join(split.names)),
            split.document_offsets.astype("<i8").tobytes(),
            split.text(),
        )
    ]
    # The hash of hashes: joining the parts themselves would let text move from one to the next.
    fingerprint = _sha256("".join(map(_sha256, parts)).encode())
    return Corpus(train, validation, test, name, fingerprint)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _describe_missing(path: Path) -> str:
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    folder = missing.parent
    try:
        similar = difflib.get_close_matches(missing.name, os.listdir(folder))
    except OSError:
        similar = []
    hint = f", which has {' and '.join(map(repr, similar))}" if similar else ""
    return (
        f"load_corpus: {path} does not exist; the nearest folder that does is {folder}{hint}. "
        "Give a file, a folder, or None for the Python standard library's source"
    )


class Batch(NamedTuple):
    """One step's tokens of B streams, T of each."""

    inputs: Tensor
    """int64 [B, T] the targets one step late; PAD where mask is False."""
    targets: Tensor
    """int64 [B, T] what is to be predicted; PAD where mask is False."""
    starts: Tensor
    """bool [B, T] True where nothing before the input may be attended to."""
    mask: Tensor
    """bool [B, T] False at padding."""
    n_bytes: int
    """Number of targets that are text bytes, that is neither END nor padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        inputs, targets, starts, mask = (tensor.to(device) for tensor in self[:4])
        return Batch(inputs, targets, starts, mask, self.n_bytes)


def _batch(
    inputs: NDArray[np.int64], targets: NDArray[np.int64], starts: NDArray[np.bool_]
) -> Batch:
    x, y, s = torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(starts)
    return Batch(x, y, s, mask=y != PAD, n_bytes=int((y >= N_SPECIAL).sum()))


class Lanes:
    """Endless training batches: a split cut in `batch_size` lanes, each read in order, in a circle.

    Every lane is `len(split.tokens) // batch_size` tokens of contiguous text (fewer than batch_size
    tokens at the end of the split are left over).  Batch i holds tokens [i * seq_len,
    (i + 1) * seq_len) of each lane, so that a model's state can be carried from one batch to the
    next; past its end a lane begins again.  `starts` is True at the first token of a document and
    at the first token of a lane, whose input is the byte before it but whose context is elsewhere.

    Args:
        batch_size: number of lanes, B.
        seq_len: tokens of each lane in one batch, T.
        cursor: number of batches already taken.

    Raises ValueError when a number is out of range, or when a lane would be shorter than seq_len.
    """

    def __init__(self, split: Split, batch_size: int, seq_len: int, cursor: int = 0) -> None:
        _check_positive("Lanes", batch_size=batch_size, seq_len=seq_len)
        n_tokens = len(split.tokens)
        if n_tokens < batch_size * seq_len:
            raise ValueError(
                f"Lanes: got {n_tokens} tokens, wanted at least {batch_size * seq_len} for "
                f"batch_size={batch_size} lanes of seq_len={seq_len}; the largest batch_size at "
                f"this seq_len is {n_tokens // seq_len}, the largest seq_len at this batch_size is "
                f"{n_tokens // batch_size}"
            )
        self._split = split
        self._lane_length = n_tokens // batch_size
        self._lane_starts = np.arange(batch_size)[:, None] * self._lane_length  # [B, 1]
        self._seq_len = seq_len
        self.load_state_dict({"cursor": cursor})

    def next_batch(self) -> Batch:
        """The following batch, [batch_size, seq_len]; moves the cursor by one."""
        begin = self._cursor * self._seq_len
        in_lane = np.arange(begin, begin + self._seq_len) % self._lane_length  # [T]
        index = self._lane_starts + in_lane  # [B, T]
        tokens = self._split.tokens
        targets = tokens[index].astype(np.int64)
        # Index -1, for the first token of all, is the END of the last document: the start symbol.
        inputs = tokens[index - 1].astype(np.int64)
        starts = (inputs == END) | (in_lane == 0)
        self._cursor += 1
        return _batch(inputs, targets, starts)

    def state_dict(self) -> dict[str, int]:
        """The number of batches taken; it has meaning for the same split, batch_size, seq_len."""
        return {"cursor": self._cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on just after the batch at which `state` was taken.

        Raises ValueError for a cursor below 0 or missing.
        """
        cursor = state.get("cursor", -1)
        if cursor < 0:
            raise ValueError(f"Lanes: got state {state}, wanted {{'cursor': number of batches}}")
        self._cursor = cursor


def evaluation_batches(
    split: Split,
    batch_size: int,
    seq_len: int,
    max_bytes: int | None = None,
    context_len: int | None = None,
) -> Iterator[Batch]:
    """Batches [B, up to seq_len] in which every target of the split has mask True exactly once.

    Whole documents are dealt out to B = min(batch_size, number of documents) rows.  Batch after
    batch walks along the rows, so a caller who carries the state from one to the next sees every
    byte with all of its document before it, and gets the same sum of losses for every batch_size
    and seq_len.  Rows that have ended are padded on the right; the last batch may be narrower.

    Args:
        max_bytes: take only the first documents up to this many text bytes, the last of them cut
            (its END is then left out), for a quick look; None takes everything.
        context_len: cut documents in pieces of this many tokens, each read as a document of its
            own (the paper's protocol, and what models with a growing state need); None: whole.

    Raises ValueError when a number is below 1, before the first batch is asked for.
    """
    _check_positive("evaluation_batches", batch_size=batch_size, seq_len=seq_len)
    if max_bytes is not None:
        _check_positive("evaluation_batches", max_bytes=max_bytes)
    documents = _first_documents(split, split.n_bytes if max_bytes is None else max_bytes)
    if context_len is not None:
        _check_positive("evaluation_batches", context_len=context_len)
        documents = [
            d[i : i + context_len] for d in documents for i in range(0, len(d), context_len)
        ]
    return _walk_rows(_deal(documents, min(batch_size, len(documents))), seq_len)


def _first_documents(split: Split, max_bytes: int) -> list[NDArray[np.uint16]]:
    offsets = split.document_offsets
    bytes_before = offsets[:-1] - np.arange(split.n_documents)
    documents = []
    for i in np.flatnonzero(bytes_before < max_bytes):
        document = split.tokens[offsets[i] : offsets[i + 1]]
        n_left = int(max_bytes - bytes_before[i])
        documents.append(document if len(document) - 1 <= n_left else document[:n_left])
    return documents


def _deal(documents: list[NDArray[np.uint16]], n_rows: int) -> list[_Row]:
    """The longest document goes first, each to the row that is shortest by then."""
    rows: list[list[NDArray[np.uint16]]] = [[] for _ in range(n_rows)]
    lengths = [(0, row) for row in range(n_rows)]
    for document in sorted(documents, key=len, reverse=True):
        length, row = lengths[0]
        rows[row].append(document)
        heapq.heapreplace(lengths, (length + len(document), row))
    start = np.full(1, END, np.uint16)
    return [
        (np.concatenate([part for d in row for part in (start, d[:-1])]), np.concatenate(row))
        for row in rows
    ]


def _walk_rows(rows: list[_Row], seq_len: int) -> Iterator[Batch]:
    n_steps = max(len(targets) for _, targets in rows)
    for begin in range(0, n_steps, seq_len):
        shape = len(rows), min(seq_len, n_steps - begin)
        inputs, targets = np.full(shape, PAD, np.int64), np.full(shape, PAD, np.int64)
        for i, (row_inputs, row_targets) in enumerate(rows):
            window = row_inputs[begin : begin + seq_len]
            inputs[i, : len(window)] = window
            targets[i, : len(window)] = row_targets[begin : begin + seq_len]
        yield _batch(inputs, targets, inputs == END)


def _check_positive(operation: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{operation}: got {name}={number}, wanted at least 1")
