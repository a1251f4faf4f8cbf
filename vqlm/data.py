"""Documents as tokens: corpora, contiguous training lanes, batches that cover a split exactly once.

A document of text d0 d1 ... dn is stored as d0 d1 ... dn END; a picture, whose length is known, has
no END.  Targets are the stored tokens; inputs are the targets one step late, and the first input of
every document is END, which is thus the start symbol as well.

    load_corpus -> Corpus of three Splits -> Lanes (training) | evaluation_batches -> Batch

Tokens may be a memory map of a file larger than memory (prepared.py): only what a batch needs is
read.

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
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor

from vqlm.vocabulary import (  # isort: skip
    BYTES, END, N_SPECIAL, PAD, UNKNOWN, VOCAB_SIZE, Vocabulary, bytes_of,
)  # fmt: skip

__all__ = [
    "END", "N_SPECIAL", "PAD", "UNKNOWN", "VOCAB_SIZE", "Batch", "Corpus", "Lanes", "Split",
    "decode", "encode", "evaluation_batches", "load_corpus",
]  # fmt: skip

_NOT_STDLIB = frozenset("site-packages dist-packages __pycache__ test tests idle_test".split())
_BINARY_CHECK_BYTES = 8192

_Pieces = Int64[np.ndarray, "_ 2"]  # where in the split's tokens each begins, and its length
_CHUNK = 1 << 16  # tokens looked at together where a split is read from its beginning

encode, decode = BYTES.encode, BYTES.decode


@dataclass(frozen=True, eq=False)
class Split:
    """Documents end to end."""

    tokens: NDArray[np.uint16]
    """[n_tokens] the documents' tokens; may be read-only and mapped from a file."""
    document_offsets: NDArray[np.int64]
    """[n_documents + 1] document i is tokens[document_offsets[i] : document_offsets[i + 1]]."""
    names: tuple[str, ...] = ()
    """One name for each document, its path relative to the corpus's folder, with `/`; or none."""
    has_ends: bool = True
    """Whether the last token of each document is END."""
    vocabulary: Vocabulary = BYTES
    """What the tokens stand for."""
    n_words: int | None = None
    """Words in the whole split, by the count that is official for perplexities; None: unknown."""
    known_bytes: int | None = None
    """What n_bytes is, where that has been counted before; None: it is counted when asked for."""

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
        """Number of documents, at least one."""
        return len(self.document_offsets) - 1

    @cached_property
    def n_bytes(self) -> int:
        """Number of text bytes; the END after each document is not counted."""
        if self.known_bytes is not None:
            return self.known_bytes
        parts = np.split(self.tokens, range(_CHUNK, len(self.tokens), _CHUNK))
        return sum(int(bytes_of(part, self.token_bytes).sum()) for part in parts)

    @property
    def token_bytes(self) -> Int64[np.ndarray, " size"]:
        """Number of text bytes that each token id stands for; 0 for the special ids."""
        return self.vocabulary.token_bytes

    def text(self) -> bytes:
        """All documents concatenated, nothing between them: what a compressor is given."""
        return self.vocabulary.decode(self.tokens)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three splits of one source of text or of pictures, in one vocabulary."""

    train: Split
    validation: Split
    test: Split
    name: str
    """What was loaded, for logs: the file's or folder's name, or `stdlib-` and Python's version."""
    fingerprint: str
    """sha256 (hex) over document names and contents: a resumed run can notice changed data."""
    kind: str = "text"
    """"text", or "image": a document is a picture, its pixels in raster order, red green blue."""
    picture_shape: tuple[int, int, int] | None = None
    """(height, width, 3) of every picture; None for text."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the tokens of all three splits stand for."""
        return self.train.vocabulary


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
        return _load_folder(root, f"stdlib-{platform.python_version()}", _NOT_STDLIB, ".py")
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
            "give a longer file, or None (no --data) for the Python standard library's source"
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
        "Give a file, a folder, or None (no --data) for the Python standard library's source"
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
    """Bytes of text that the targets stand for; END and padding stand for none."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        inputs, targets, starts, mask = (tensor.to(device) for tensor in self[:4])
        return Batch(inputs, targets, starts, mask, self.n_bytes)


def _batch(
    inputs: Int64[np.ndarray, "B T"],
    targets: Int64[np.ndarray, "B T"],
    starts: Bool[np.ndarray, "B T"],
    token_bytes: Int64[np.ndarray, " size"],
) -> Batch:
    x, y, s = torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(starts)
    return Batch(x, y, s, mask=y != PAD, n_bytes=int(bytes_of(targets, token_bytes).sum()))


class Lanes:
    """Endless training batches: a split cut in `batch_size` lanes, each read in order, in a circle.

    Every lane is `len(split.tokens) // batch_size` tokens of contiguous text (fewer than batch_size
    tokens at the end of the split are left over).  Documents of one length without END, that is
    pictures, are not cut: a lane is then `n_documents // batch_size` of them.  Batch i holds tokens
    [i * seq_len, (i + 1) * seq_len) of each lane, so that a model's state can be carried from one
    batch to the next; past its end a lane begins again.  `starts` is True at the first token of a
    document and at the first token of a lane, whose input is the token before it but whose context
    is elsewhere.  ``cursor``: number of batches already taken.

    Raises ValueError when a number is out of range, or when a lane would be shorter than seq_len.
    """

    def __init__(self, split: Split, batch_size: int, seq_len: int, cursor: int = 0) -> None:
        _check_positive("Lanes", batch_size=batch_size, seq_len=seq_len)
        unit = _lane_unit(split, batch_size)
        n_units, units_wanted = len(split.tokens) // unit, -(-seq_len // unit)
        if n_units < batch_size * units_wanted:
            raise ValueError(
                f"Lanes: got {len(split.tokens)} tokens, wanted at least "
                f"{batch_size * units_wanted * unit} for batch_size={batch_size} lanes of "
                f"seq_len={seq_len}; the largest batch_size at this seq_len is "
                f"{n_units // units_wanted}, the largest seq_len at this batch_size is "
                f"{n_units // batch_size * unit}"
            )
        self._split = split
        self._lane_length = n_units // batch_size * unit
        self._lane_starts = np.arange(batch_size)[:, None] * self._lane_length  # [B, 1]
        self._seq_len, self._columns = seq_len, slice(None)
        self.load_state_dict({"cursor": cursor})

    def read_only(self, rows: list[int], columns: slice) -> None:
        """Batches have these of the lanes, and these of the tokens, from now on (processes.py)."""
        self._lane_starts, self._columns = self._lane_starts[rows], columns

    def next_batch(self) -> Batch:
        """The following batch, [batch_size, seq_len]; moves the cursor by one."""
        begin = self._cursor * self._seq_len
        step = np.arange(begin, begin + self._seq_len)[self._columns]
        in_lane = step % self._lane_length  # [T]
        index = self._lane_starts + in_lane  # [B, T]
        tokens, offsets = self._split.tokens, self._split.document_offsets
        begins = offsets[np.searchsorted(offsets, index)] == index
        targets = tokens[index].astype(np.int64)
        inputs = np.where(begins, END, tokens[index - 1].astype(np.int64))
        self._cursor += 1
        return _batch(inputs, targets, begins | (in_lane == 0), self._split.token_bytes)

    def state_dict(self) -> dict[str, int]:
        """The number of batches taken; it has meaning for the same split, batch_size, seq_len."""
        return {"cursor": self._cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on just after the batch at which `state` was taken.

        Raises ValueError for a cursor that is missing, below 0, or no number of batches.
        """
        cursor = state.get("cursor", -1)
        if type(cursor) is not int or not 0 <= cursor < 1 << 40:
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
    token with all of its document before it, and gets the same sum of losses for every batch_size
    and seq_len.  Rows that have ended are padded on the right; the last batch may be narrower.
    Tokens are read when their batch is asked for.

    Args:
        max_bytes: take only the first tokens that stand for up to this many bytes of text, at least
            one token, for a quick look; the last document may be cut.  None takes everything.
        context_len: cut documents in pieces of this many tokens, each read as a document of its
            own (the paper's protocol, and what models with a growing state need); None: whole.

    Raises ValueError when a number is below 1, before the first batch is asked for.
    """
    _check_positive("evaluation_batches", batch_size=batch_size, seq_len=seq_len)
    optional = {"max_bytes": max_bytes, "context_len": context_len}
    _check_positive("evaluation_batches", **{k: n for k, n in optional.items() if n is not None})
    pieces = _pieces(split, max_bytes, context_len)
    return _walk_rows(split, _deal(pieces, min(batch_size, len(pieces))), seq_len)


def _pieces(split: Split, max_bytes: int | None, context_len: int | None) -> _Pieces:
    """What is to be read, in order: documents, or their parts of at most context_len tokens."""
    n_tokens = len(split.tokens) if max_bytes is None else _tokens_within(split, max_bytes)
    begins = split.document_offsets[: np.searchsorted(split.document_offsets, n_tokens)]
    lengths = np.diff(begins, append=n_tokens)
    if context_len is not None:
        n_parts = -(-lengths // context_len)
        # 0, 1, ... n_parts - 1 for each document.
        part = np.arange(n_parts.sum()) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
        begins = np.repeat(begins, n_parts) + part * context_len
        lengths = np.minimum(np.repeat(lengths, n_parts) - part * context_len, context_len)
    return np.stack([begins, lengths], axis=1)


def _tokens_within(split: Split, max_bytes: int) -> int:
    """The largest number of tokens, from the first one, that stand for at most max_bytes."""
    n_left = max_bytes
    for begin in range(0, len(split.tokens), _CHUNK):
        ends = np.cumsum(bytes_of(split.tokens[begin : begin + _CHUNK], split.token_bytes))
        if ends[-1] > n_left:
            return max(1, begin + int(np.searchsorted(ends, n_left, side="right")))
        n_left -= int(ends[-1])
    return len(split.tokens)


def _deal(pieces: _Pieces, n_rows: int) -> list[_Pieces]:
    """The longest piece goes first, each to the row that is shortest by then."""
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    lengths = [(0, row) for row in range(n_rows)]
    for i in np.argsort(-pieces[:, 1], kind="stable").tolist():
        length, row = lengths[0]
        rows[row].append(i)
        heapq.heapreplace(lengths, (length + int(pieces[i, 1]), row))
    return [pieces[row] for row in rows]


def _walk_rows(split: Split, rows: list[_Pieces], seq_len: int) -> Iterator[Batch]:
    ends = [np.cumsum(row[:, 1]) for row in rows]
    n_steps = int(max(row_ends[-1] for row_ends in ends))
    for begin in range(0, n_steps, seq_len):
        shape = len(rows), min(seq_len, n_steps - begin)
        inputs, targets = np.full(shape, PAD, np.int64), np.full(shape, PAD, np.int64)
        starts = np.zeros(shape, np.bool_)
        for i, (row, row_ends) in enumerate(zip(rows, ends, strict=True)):
            step = np.arange(begin, min(begin + seq_len, int(row_ends[-1])))
            piece = np.searchsorted(row_ends, step, side="right")
            in_piece = step - (row_ends - row[:, 1])[piece]
            index = row[piece, 0] + in_piece
            targets[i, : len(step)] = split.tokens[index]
            starts[i, : len(step)] = in_piece == 0
            inputs[i, : len(step)] = np.where(in_piece == 0, END, split.tokens[index - 1])
        yield _batch(inputs, targets, starts, split.token_bytes)


def _lane_unit(split: Split, batch_size: int) -> int:
    """Number of tokens that a lane's length must be a multiple of."""
    if split.has_ends or split.n_documents < batch_size:
        return 1
    lengths = np.diff(split.document_offsets)
    return int(lengths[0]) if (lengths == lengths[0]).all() else 1


def _check_positive(operation: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{operation}: got {name}={number}, wanted at least 1")
