"""Official data sets, and pictures of one's own, to prepared folders (prepared.py).

Sources are read in parts, hashed on the way, and looked at again at the end: what changed while it
was read gives an error and no folder.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from jaxtyping import UInt8

from vqlm.config import MOST, require_known
from vqlm.pictures import load_picture
from vqlm.prepared import SPLITS, PreparedWriter, SplitName, refuse_occupied
from vqlm.vocabulary import BYTES, N_SPECIAL, Vocabulary, train_sentencepiece

_BLOCK = 1 << 22
_MAX_SOURCES = 100  # files listed one by one in a manifest
_OFFICIAL_TRAIN_IMAGES = 1_200_000
_ROWS = 256  # pictures read together
# From the table in the data set's own README: books and words of each split.
_PG19 = {"train": (28_602, 1_973_136_207), "validation": (50, 3_007_061), "test": (100, 6_966_499)}


def prepare(name: str, source: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Reads a data set and writes it as a prepared folder, which `open_corpus` opens.

    Names, what `source` is, options with their defaults, and splits:

    - "enwik8": any file, of 20 bytes or more; its bytes are cut 90/5/5, each split one document
      without END, so that tokens are bytes.
    - "pg19": a folder of {train,validation,test}/ID.txt, in UTF-8, and metadata.csv, whose first
      column lists the IDs, of all files and no others.  Options: vocab_size=32000 and
      sample_bytes=1_000_000_000, of the training books (in the order of the sha256 of their IDs),
      for a SentencePiece vocabulary; vocab_size=0: tokens are bytes.  END follows each book.
      n_words is counted by str.split(); where a split has the official number of books and a
      count within 10% of the published one, it is the published one, by which all published
      perplexities are computed.
    - "imagenet64": a folder of train_data_batch_*.npz and val_data.npz, as ImageNet hands out.  The
      first 1,200,000 training pictures are for training, the rest for validation, val_data is for
      the test; of fewer training pictures the last 1/16, at least one, are for validation.
    - "pictures": a folder of picture files, three or more; hidden ones and links do not count.
      Options: size=64, skip_bad=False: whether files that cannot be decoded are left out and
      counted.  In the order of the sha256 of their relative names they are cut 90/5/5.

    Returns the manifest without its list of files, and `folder`.

    Raises ValueError for an unknown name or option, a source that is not as above, or one that
    changed meanwhile; OSError for too little disk or what cannot be read.  Then nothing is written.
    """
    makers: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, int | None]]] = {
        "enwik8": (_enwik8, {}),
        "pg19": (_pg19, {"vocab_size": 0, "sample_bytes": 1}),
        "imagenet64": (_imagenet64, {}),
        "pictures": (_pictures, {"size": 1, "skip_bad": None}),
    }
    require_known("data set", name, makers)
    make, known = makers[name]
    for option, value in options.items():
        require_known(f"option of {name}", option, known)
        _require_option(f"prepare {name}: {option}", value, known[option])
    path, folder = Path(source).expanduser(), Path(out).expanduser()
    wants_file = name == "enwik8"
    if not (path.is_file() if wants_file else path.is_dir()):
        raise FileNotFoundError(
            f"prepare {name}: {path} is not a {'file' if wants_file else 'folder'}"
        )
    refuse_occupied(folder)
    manifest = make(path, folder, **options)
    return {"folder": str(folder)} | {k: v for k, v in manifest.items() if k != "files"}


def _require_option(what: str, value: object, least: int | None) -> None:
    """Nothing, if it is a number from `least` on; None: a truth value.  A text would be true."""
    if least is None and type(value) is not bool:
        raise ValueError(f"{what}={value!r}, wanted true or false")
    if least is not None and not (type(value) is int and least <= value <= MOST):
        raise ValueError(f"{what}={value!r}, wanted a whole number, {least} or more")


class _Sources:
    """The files that were read: their hashes, and whether they are still what they were."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[Path, tuple[int, int]] = {}
        self._hashes: dict[Path, str] = {}

    def see(self, path: Path) -> int:
        """Remembers size and time of a file that is going to be read; returns its size."""
        self._seen[path] = _stamp(path)
        return self._seen[path][0]

    def read(self, path: Path) -> bytes:
        """A whole file."""
        content = path.read_bytes()
        self._hashes[path] = hashlib.sha256(content).hexdigest()
        return content

    def blocks(self, path: Path) -> Iterator[bytes]:
        """A file in parts."""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                yield block
        self._hashes[path] = digest.hexdigest()

    def describe(self) -> list[dict[str, Any]]:
        """The manifest's list of sources.

        Raises ValueError if a file has changed since it was seen.
        """
        for path, stamp in self._seen.items():
            if not path.exists() or _stamp(path) != stamp:
                raise ValueError(
                    f"{path} changed while it was read, nothing was written; let it be, and start "
                    "again"
                )
        entries = [
            {
                "name": path.relative_to(self._root).as_posix(),
                "size": self._seen[path][0],
                "sha256": self._hashes[path],
            }
            for path in sorted(self._seen)
        ]
        if len(entries) <= _MAX_SOURCES:
            return entries
        # One line for all: millions of pictures would make a manifest larger than memory.
        listing = "".join(f"{e['sha256']}  {e['name']}\n" for e in entries)
        total = sum(stamp[0] for stamp in self._seen.values())
        digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
        return [{"name": ".", "files": len(entries), "size": total, "sha256": digest}]


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _enwik8(path: Path, folder: Path) -> dict[str, Any]:
    sources = _Sources(path.parent)
    n = sources.see(path)
    if n < 20:
        raise ValueError(f"{path} has {n} bytes, wanted at least 20 to split it 90/5/5")
    ends: list[tuple[int, SplitName]]
    ends = [(n * 90 // 100, "train"), (n * 95 // 100, "validation"), (n, "test")]
    with PreparedWriter(folder, path.name, BYTES, has_ends=False) as writer:
        writer.require_space(2 * n)
        position = 0
        for block in sources.blocks(path):
            left = block
            for end, split in ends:
                part, left = left[: max(0, end - position)], left[max(0, end - position) :]
                writer.write(split, BYTES.encode(part))
                position += len(part)
        described = sources.describe()
        for split in SPLITS:
            writer.end_document(split)
        return writer.publish(described)


def _pg19(
    root: Path, folder: Path, vocab_size: int = 32_000, sample_bytes: int = 1_000_000_000
) -> dict[str, Any]:
    sources = _Sources(root)
    books = _list_books(root, sources)
    size = {split: sum(map(sources.see, books[split])) for split in SPLITS}

    def text(path: Path) -> str:
        content = sources.read(path)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8: {error.reason} at byte {error.start} "
                f"(0x{content[error.start]:02x}); convert it first"
            ) from error

    sample = sorted(books["train"], key=lambda path: _hash_of_name(path.stem))
    with PreparedWriter(folder, root.resolve().name, BYTES) as writer:
        # A token is two bytes, and a piece stands for some four of English; measured below.
        writer.require_space(sum(size.values()) // 4 if vocab_size else 2 * sum(size.values()))
        vocabulary: Vocabulary = BYTES
        if vocab_size:
            vocabulary = train_sentencepiece(map(text, sample), vocab_size, sample_bytes)
        writer.vocabulary = vocabulary
        # The small splits first: they tell how much room the training split will need.
        for split in reversed(SPLITS):
            if split == "train":
                n_tokens = sum(writer.counts[s]["n_tokens"] for s in SPLITS)
                share = n_tokens / (size["test"] + size["validation"])
                writer.require_space(int(2 * share * size["train"]))
            for path in books[split]:
                content = text(path)
                tokens = vocabulary.encode(content.encode())
                if not len(tokens):
                    raise ValueError(f"{path} is empty; leave it out, also of metadata.csv")
                writer.add(split, tokens, len(content.split()))
            writer.counts[split]["n_words"] = _official_words(split, writer.counts[split])
        return writer.publish(sources.describe())


def _list_books(root: Path, sources: _Sources) -> dict[SplitName, list[Path]]:
    """The books of each split, by ID; metadata.csv and the folders must tell the same."""
    metadata = root / "metadata.csv"
    if not metadata.is_file():
        raise ValueError(f"{root} has no metadata.csv, which lists the books; wanted PG-19's files")
    sources.see(metadata)
    try:
        table = io.StringIO(sources.read(metadata).decode("utf-8-sig"), newline="")
        first = [row[0].strip() for row in csv.reader(table) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{metadata} is not a table in UTF-8: {error}") from error
    listed = set(first if first and first[0].isdigit() else first[1:])  # some have a heading
    books: dict[SplitName, list[Path]] = {s: sorted((root / s).glob("*.txt")) for s in SPLITS}
    found: dict[str, Path] = {}
    for split, paths in books.items():
        if not paths:
            raise ValueError(f"{root / split} has no books; wanted ID.txt files")
        for path in paths:
            if path.stem in found:
                raise ValueError(f"{path} is in two splits, see {found[path.stem]}; remove one")
            found[path.stem] = path
    if missing := sorted(listed - found.keys()):
        raise ValueError(
            f"{metadata} lists {len(missing)} books that no split has, such as {missing[0]}; "
            "download them, or take them out of the list"
        )
    if unlisted := sorted(found.keys() - listed):
        raise ValueError(
            f"{found[unlisted[0]]} and {len(unlisted) - 1} more books are not in {metadata}; add "
            "them, or remove the files"
        )
    return books


def _official_words(split: SplitName, counts: dict[str, Any]) -> int | None:
    n_books, n_words = _PG19[split]
    counted = counts["n_words"]
    alike = counts["n_documents"] == n_books and math.isclose(counted, n_words, rel_tol=0.1)
    return n_words if alike else counted or None


def _imagenet64(root: Path, folder: Path) -> dict[str, Any]:
    batches = sorted(root.glob("train_data_batch_*.npz"), key=_number_in_name)
    test = root / "val_data.npz"
    if not batches or not test.is_file():
        raise ValueError(
            f"{root} has {len(batches)} train_data_batch_*.npz and "
            f"{'a' if test.is_file() else 'no'} val_data.npz; wanted both"
        )
    sources = _Sources(root)
    for path in (*batches, test):
        sources.see(path)
    n = {path: _count_pictures(path) for path in (*batches, test)}
    total = sum(n[path] for path in batches)
    n_train = total - max(1, total // 16)
    if total > _OFFICIAL_TRAIN_IMAGES:
        n_train = _OFFICIAL_TRAIN_IMAGES
    if n_train < 1:
        raise ValueError(f"{root} has {total} training pictures, wanted at least 2 to split them")
    name = root.resolve().name
    with PreparedWriter(folder, name, BYTES, has_ends=False, picture_shape=(64, 64, 3)) as writer:
        writer.require_space(2 * 12288 * (total + n[test]))
        for path in (*batches, test):
            for rows in _planar_rows(path):
                pixels = rows.reshape(-1, 3, 64 * 64).transpose(0, 2, 1).reshape(-1, 12288)
                for picture in pixels.astype(np.uint16) + np.uint16(N_SPECIAL):
                    seen = writer.counts["train"]["n_documents"]
                    split: SplitName = "train" if seen < n_train else "validation"
                    writer.add("test" if path == test else split, picture)
            for _ in sources.blocks(path):
                pass
        return writer.publish(sources.describe())


def _number_in_name(path: Path) -> tuple[int, str]:
    found = re.fullmatch(r"train_data_batch_(\d+)", path.stem)
    if found is None:
        raise ValueError(f"{path} has no number; wanted train_data_batch_1.npz, _2.npz, ...")
    return int(found[1]), path.name


def _count_pictures(path: Path) -> int:
    with _opened(path) as (_, n):
        return n


def _planar_rows(path: Path) -> Iterator[UInt8[np.ndarray, "n 12288"]]:
    """Some pictures after the other; the last read meets the archive's checksum."""
    with _opened(path) as (file, n_left):
        while n_left:
            n = min(n_left, _ROWS)
            content = file.read(n * 12288)
            if len(content) != n * 12288:
                raise EOFError(f"it ends {n_left} pictures early")
            yield np.frombuffer(content, np.uint8).reshape(n, 12288)
            n_left -= n
        if file.read(1):
            raise ValueError("it is longer than its header says")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The pixels in an archive, and the number of pictures; errors in reading them name it."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as file:
            major = np.lib.format.read_magic(file)[0]
            read = {
                1: np.lib.format.read_array_header_1_0,
                2: np.lib.format.read_array_header_2_0,
            }
            if major not in read:
                raise ValueError(f"data.npy has format version {major}, wanted 1 or 2")
            shape, fortran, dtype = read[major](file)
            if dtype != np.uint8 or len(shape) != 2 or shape[1] != 12288 or not shape[0] or fortran:
                order = ", column by column" if fortran else ""
                raise ValueError(f"data is {dtype} {shape}{order}, wanted uint8 (n, 12288)")
            yield file, int(shape[0])
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} is damaged, or no file of ImageNet64's: {error}; download it again"
        ) from error


def _pictures(root: Path, folder: Path, size: int = 64, skip_bad: bool = False) -> dict[str, Any]:
    paths = sorted(_walk(root), key=lambda path: _hash_of_name(path.relative_to(root).as_posix()))
    n = len(paths)
    if n < 3:
        raise ValueError(f"{root} has {n} files, wanted at least 3 pictures to split them")
    first = min(n * 90 // 100, n - 2)
    second = max(n * 95 // 100, first + 1)
    sources, skipped = _Sources(root), 0
    shape = (size, size, 3)
    name = root.resolve().name
    with PreparedWriter(folder, name, BYTES, has_ends=False, picture_shape=shape) as writer:
        writer.require_space(2 * n * math.prod(shape))
        for i, path in enumerate(paths):
            sources.see(path)
            sources.read(path)
            try:
                picture = load_picture(path, size)
            except ValueError:
                if not skip_bad:
                    raise
                skipped += 1
                continue
            split: SplitName = "train" if i < first else "validation" if i < second else "test"
            writer.add(split, picture.reshape(-1).astype(np.uint16) + np.uint16(N_SPECIAL))
        return {**writer.publish(sources.describe()), "skipped": skipped}


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    for parent, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if f[0] != "."]
        for path in (Path(parent, file) for file in files if file[0] != "."):
            if path.is_file() and not path.is_symlink():
                yield path


def _hash_of_name(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()
