"""Token ids and the bytes they stand for: single bytes, or SentencePiece's byte-pair pieces.

Ids 0 padding, 1 end of document, 2 unknown.  In the byte vocabulary byte b is b + 3.  Both kinds
are lossless: decode(encode(text)) is the text, so bits per byte and perplexities per word that are
computed from a sum over tokens are exact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt16
from numpy.typing import NDArray

from vqlm.untrusted import read_bytes

PAD, END, UNKNOWN, N_SPECIAL = 0, 1, 2, 3
VOCAB_SIZE = N_SPECIAL + 256
MODEL_FILE = "vocabulary.model"

_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
_MAX_LINE_BYTES = 1 << 16
_MAX_MODEL = 1 << 26  # bytes of a file
_MAX_KNOWN = 1 << 18  # words whose ids are remembered
# What a normalizer would change: spaces at the ends and in runs, controls, compatibility forms.
_PROBE = "  a\t\n\r\n b\0 \ufb01 \uff21 e\u0301 \U0001f600 <s></s><unk> "


@runtime_checkable
class Vocabulary(Protocol):
    """A lossless mapping between text and token ids."""

    @property
    def kind(self) -> str:
        """ "bytes" or "sentencepiece"."""

    @property
    def size(self) -> int:
        """Number of ids; ids are 0 to size - 1."""

    @property
    def token_bytes(self) -> Int64[np.ndarray, " size"]:
        """Number of bytes of text that each id stands for, 0 for the special ids.  Read-only."""

    def encode(self, text: bytes) -> UInt16[np.ndarray, " n"]:
        """Token ids of a text; no END is added.

        Raises ValueError for a text that the vocabulary cannot hold.
        """

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        """The text of token ids; special ids are dropped.

        Raises ValueError for ids outside [0, size).
        """

    def save(self, folder: Path) -> None:
        """Leaves `folder`, which must exist, such that `load_vocabulary` finds this vocabulary."""


class ByteVocabulary:
    """One id for each byte: any bytes are text."""

    kind = "bytes"
    size = VOCAB_SIZE

    def __init__(self) -> None:
        self.token_bytes: Int64[np.ndarray, " size"] = np.ones(VOCAB_SIZE, np.int64)
        self.token_bytes[:N_SPECIAL] = 0
        self.token_bytes.flags.writeable = False

    def encode(self, text: bytes) -> UInt16[np.ndarray, " n"]:
        """Token ids uint16 [len(text)] of a byte string; no END is added."""
        return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(N_SPECIAL)

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        """The byte string of token ids (any integer dtype, one axis); special ids are dropped.

        Raises ValueError for ids outside [0, VOCAB_SIZE).
        """
        array = _checked(ids, self.size)
        return (array[array >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()

    def save(self, folder: Path) -> None:
        """Removes another vocabulary's model from `folder`: without one, text is bytes."""
        (folder / MODEL_FILE).unlink(missing_ok=True)


class SentencePieceVocabulary:
    """Pieces of words, learned by byte-pair encoding; a character without a piece is its bytes.

    Text must be valid UTF-8.  SentencePiece itself would turn U+2581, which it uses for the space,
    into a space; here that character is always three byte ids.

    Args:
        model: a SentencePiece model, the contents of its file.

    Raises ValueError for a damaged model, or one that is not lossless: other special ids than
    above, no ids for single bytes, more than 65,536 ids, or a normalizer that changes text.
    ModuleNotFoundError when sentencepiece is not installed.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        # Imported here: bytes need no such library.
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            # An empty model would be taken for "none given", and fail only when it is used.
            self._processor = SentencePieceProcessor(model_proto=model or b"damaged")
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        processor = self._processor
        special = processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()
        if special != (PAD, END, UNKNOWN, -1):
            raise ValueError(
                f"SentencePiece model: its ids of padding, end, unknown and begin are {special}, "
                f"wanted {(PAD, END, UNKNOWN, -1)}; train one with train_sentencepiece"
            )
        self.size = int(processor.get_piece_size())
        self._pieces = [self._bytes_of(i) for i in range(self.size)]
        single = {bytes([b]): i for i, b in self._byte_ids()}
        if len(single) != 256 or self.size > 1 << 16:
            raise ValueError(
                f"SentencePiece model: {len(single)} ids of single bytes among {self.size}, wanted "
                "all 256 among at most 65536; train one with train_sentencepiece"
            )
        # Parts that no piece reaches across, as when pieces are learned within words and lines:
        # encoded one by one they give the same ids, and most words have been seen before.
        apart = not any(b"\n" in piece or b" " in piece.lstrip(b" ") for piece in self._learned())
        word = r"\n| *[^ \n_]+| +" if apart else r"[^_]+"
        self._part = re.compile(f"_|{word}".replace("_", _SPACE))
        self._known = {_SPACE: [single[bytes([b])] for b in _SPACE.encode()]}
        self.token_bytes: Int64[np.ndarray, " size"] = np.array(
            [len(piece) for piece in self._pieces], np.int64
        )
        self.token_bytes.flags.writeable = False
        if self.decode(self.encode(_PROBE.encode())) != _PROBE.encode():
            raise self._changes_text()

    def _bytes_of(self, i: int) -> bytes:
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        piece: str = self._processor.id_to_piece(i)
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        return piece.replace(_SPACE, " ").encode()

    def _byte_ids(self) -> Iterator[tuple[int, int]]:
        for i in range(self.size):
            if self._processor.is_byte(i):
                yield i, self._pieces[i][0]

    def _changes_text(self) -> ValueError:
        return ValueError(
            "SentencePiece model: it changes text (spaces, compatibility characters), so no "
            "figure per byte would be exact; train one with train_sentencepiece"
        )

    def _learned(self) -> Iterator[bytes]:
        return (p for i, p in enumerate(self._pieces) if not self._processor.is_byte(i))

    def encode(self, text: bytes) -> UInt16[np.ndarray, " n"]:
        """Token ids uint16 [n] of UTF-8 text; no END is added.

        Raises ValueError for text that is not UTF-8, naming the first bad byte.
        """
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text is not UTF-8: {error.reason} at byte {error.start} "
                f"(0x{text[error.start]:02x}); convert it to UTF-8 first"
            ) from error
        ids: list[int] = []
        for part in self._part.findall(decoded):
            if (part_ids := self._known.get(part)) is None:
                part_ids = self._processor.encode(part)
                if len(part) < 64 and len(self._known) < _MAX_KNOWN:
                    self._known[part] = part_ids
            ids += part_ids
        array = np.array(ids, np.uint16)
        if self.token_bytes[array].sum() != len(text):
            raise self._changes_text()
        return array

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> bytes:
        """The text of token ids (any integer dtype, one axis); special ids are dropped.

        Cut in the middle of a character that has no piece, it is not valid UTF-8.
        Raises ValueError for ids outside [0, size).
        """
        return b"".join(self._pieces[i] for i in _checked(ids, self.size).tolist())

    def save(self, folder: Path) -> None:
        """Writes `vocabulary.model`, in one step."""
        partial = folder / f".{MODEL_FILE}.partial"
        partial.write_bytes(self._model)
        os.replace(partial, folder / MODEL_FILE)


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary saved in `folder`: its `vocabulary.model`, or bytes where there is none.

    Raises ValueError for a damaged model.
    """
    path = folder / MODEL_FILE
    if not path.exists():
        return ByteVocabulary()
    try:
        return SentencePieceVocabulary(read_bytes(path, _MAX_MODEL))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def train_sentencepiece(
    texts: Iterable[str], size: int = 32_000, sample_bytes: int = 1_000_000_000
) -> SentencePieceVocabulary:
    """A vocabulary of `size` ids, learned from the first `sample_bytes` of UTF-8 of `texts`.

    Lines are what SentencePiece calls sentences; newlines get no pieces of their own, they are
    byte ids.  The same texts give the same vocabulary.  The sample is held in memory.

    Raises ValueError when there is too little text for so many pieces, naming the largest size.
    """
    if not VOCAB_SIZE < size <= 1 << 16 or sample_bytes < 1:
        raise ValueError(
            f"train_sentencepiece: got size={size} and sample_bytes={sample_bytes}, wanted a size "
            "of 260 to 65536 (259 ids are specials and bytes) and at least one byte"
        )
    import io

    from sentencepiece import SentencePieceTrainer

    failures: list[BaseException] = []

    def sentences() -> Iterator[str]:
        # SentencePiece makes a RuntimeError of whatever is raised in here, Ctrl-C included.
        try:
            yield from _lines(texts, sample_bytes)
        except BaseException as error:
            failures.append(error)
            raise

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=size,
            pad_id=PAD, eos_id=END, unk_id=UNKNOWN, bos_id=-1, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, character_coverage=0.9995,
            max_sentence_length=_MAX_LINE_BYTES, shuffle_input_sentence=False,
            num_threads=os.cpu_count() or 1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise ValueError(
            f"train_sentencepiece: no vocabulary of {size} ids from this text; give more text or "
            f"a smaller vocab_size: {error}"
        ) from error
    return SentencePieceVocabulary(model.getvalue())


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines of the texts, long ones in parts, until they have `max_bytes`, newlines included."""
    n_left = max_bytes
    part = _MAX_LINE_BYTES // 4  # characters, of at most 4 bytes each
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), part):
                yield line[begin : begin + part]
            n_left -= len(line.encode()) + 1
            if n_left <= 0:
                return


def _checked(ids: NDArray[np.integer] | Sequence[int], size: int) -> NDArray[np.integer]:
    array = np.asarray(ids, dtype=np.uint16 if len(ids) == 0 else None)
    if array.size and not 0 <= array.min() <= array.max() < size:
        raise ValueError(
            f"decode: got ids from {array.min()} to {array.max()}, wanted 0 to {size - 1}; "
            "they come from another vocabulary"
        )
    return array


def bytes_of(
    tokens: NDArray[np.integer], token_bytes: Int64[np.ndarray, " size"]
) -> NDArray[np.int64]:
    """How many bytes each token stands for; token files are too large to be checked beforehand.

    Raises ValueError for ids that the vocabulary does not have.
    """
    if tokens.size and int(tokens.max()) >= len(token_bytes):
        raise ValueError(
            f"a token has id {int(tokens.max())}, but the vocabulary has {len(token_bytes)} ids: "
            "damaged data, or of another vocabulary; vqlm data verify finds damage"
        )
    return token_bytes[tokens]


BYTES = ByteVocabulary()
