"""Official layouts become the official splits; whatever is wrong with a source is named."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import text

from vqlm import prepare as module
from vqlm.data import END, Lanes
from vqlm.pictures import save_png
from vqlm.prepare import prepare
from vqlm.prepared import open_corpus, sha256_of, verify

BOOKS = {f"train/{i}": text(60 + i, seed=i) + b"\n\n  end\n" for i in range(9)}
BOOKS |= {"validation/20": "é \u2581 state linear".encode(), "test/30": text(20), "test/31": b"x"}
SMALL = {"vocab_size": 300, "sample_bytes": 10_000}


def pg19(root: Path, books: dict[str, bytes] = BOOKS, metadata: str | None = None) -> Path:
    for name, content in books.items():
        path = root / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    rows = "".join(f'{name.split("/")[1]},"A, title",1900,http://x\n' for name in books)
    (root / "metadata.csv").write_text(rows if metadata is None else metadata)
    return root


def imagenet(root: Path, *sizes: int, n_test: int = 3) -> list[np.ndarray]:
    """Batches in the official format; returns the pictures [n, 64, 64, 3] of each, test last."""
    root.mkdir()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8) for n in (*sizes, n_test)]
    names = [f"train_data_batch_{i}" for i in range(1, len(sizes) + 1)] + ["val_data"]
    for name, images in zip(names, pictures, strict=True):
        data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        np.savez(root / name, data=data, labels=np.zeros(len(images)), mean=data.mean(0))
    return pictures


def test_a_file_is_cut_as_enwik8_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)  # so that cuts fall into blocks and between them
    content = bytes(range(256)) * 3 + b"tail"  # 772 bytes
    (tmp_path / "raw").write_bytes(content)
    facts = prepare("enwik8", tmp_path / "raw", tmp_path / "out")
    corpus = open_corpus(tmp_path / "out")
    got = [split.text() for split in (corpus.train, corpus.validation, corpus.test)]
    assert got == [content[:694], content[694:733], content[733:]]
    assert len(corpus.train.tokens) == corpus.train.n_bytes == 694
    assert corpus.train.n_documents == 1 and not corpus.train.has_ends
    source = {"name": "raw", "size": 772, "sha256": sha256_of(tmp_path / "raw")}
    assert facts["sources"] == [source]
    assert facts["folder"] == str(tmp_path / "out") and facts["splits"]["test"]["n_bytes"] == 39


@pytest.mark.parametrize("vocab_size", [300, 0])
def test_books_keep_their_borders_bytes_and_words(tmp_path: Path, vocab_size: int) -> None:
    options = SMALL | {"vocab_size": vocab_size}
    facts = prepare("pg19", pg19(tmp_path / "pg19"), tmp_path / "out", **options)
    corpus = open_corpus(tmp_path / "out")
    verify(tmp_path / "out")
    assert corpus.vocabulary.size == (vocab_size or 259)
    for name in ("train", "validation", "test"):
        split, books = getattr(corpus, name), [v for k, v in BOOKS.items() if k.startswith(name)]
        spans = zip(split.document_offsets[:-1], split.document_offsets[1:], strict=True)
        documents = [split.tokens[a:b] for a, b in spans]
        assert [corpus.vocabulary.decode(d) for d in documents] == books
        assert all(d[-1] == END and END not in d[:-1] for d in documents)
        assert split.n_bytes == sum(map(len, books))
        assert split.n_words == sum(len(book.decode().split()) for book in books)
    assert len(facts["sources"]) == len(BOOKS) + 1


def test_published_word_counts_are_for_the_published_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PG19", {"train": (9, 600), "validation": (1, 9), "test": (3, 21)})
    prepare("pg19", pg19(tmp_path / "pg19"), tmp_path / "out", **SMALL)
    corpus = open_corpus(tmp_path / "out")
    counted = sum(len(v.split()) for k, v in BOOKS.items() if k.startswith("train"))
    assert counted != 600 and abs(counted - 600) < 60
    got = [split.n_words for split in (corpus.train, corpus.validation, corpus.test)]
    assert got == [600, 4, 21]  # 4 is too far from 9, and 3 is another number of books


def test_only_training_books_shape_the_vocabulary(tmp_path: Path) -> None:
    other = BOOKS | {"test/30": b"entirely different letters " * 50, "validation/20": b"zzz"}
    vocabularies = []
    for name, books in {"a": BOOKS, "b": other}.items():
        prepare("pg19", pg19(tmp_path / name, books), tmp_path / f"{name}.out", **SMALL)
        vocabularies.append((tmp_path / f"{name}.out" / "vocabulary.model").read_bytes())
    assert vocabularies[0] == vocabularies[1]


LISTED = "".join(f"{name.split('/')[1]},t\n" for name in BOOKS)


@pytest.mark.parametrize(
    ("books", "metadata", "message"),
    [
        ({}, LISTED + "99,t\n", "lists 1 books that no split has, such as 99"),
        ({}, LISTED.replace("20,t\n", ""), "validation/20.txt and 0 more books are not in"),
        ({"test/3": b"three"}, LISTED + "3,t\n", "test/3.txt is in two splits"),
        ({"test/31": b""}, None, "31.txt is empty"),
        ({"test/31": b"ab\xe9 latin"}, None, r"31.txt is not UTF-8: .* byte 2 \(0xe9\)"),
        ({"train/4": b"\xff"}, None, r"train/4.txt is not UTF-8: .* byte 0"),
        ({}, "id,title\n" + LISTED, None),  # a heading
        ({}, "\ufeff" + LISTED, None),  # a byte order mark
    ],
)
def test_lists_and_books_that_do_not_agree(
    tmp_path: Path, books: dict[str, bytes], metadata: str | None, message: str | None
) -> None:
    root = pg19(tmp_path / "pg19", BOOKS | books, metadata)
    if message is None:
        prepare("pg19", root, tmp_path / "out", **SMALL)
        return
    with pytest.raises(ValueError, match=message):
        prepare("pg19", root, tmp_path / "out", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["pg19"]


def test_a_folder_that_is_not_pg19(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no metadata.csv"):
        prepare("pg19", tmp_path, tmp_path / "out")
    (tmp_path / "metadata.csv").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not a table in UTF-8"):
        prepare("pg19", tmp_path, tmp_path / "out")
    (tmp_path / "metadata.csv").write_text("1,x\n")
    with pytest.raises(ValueError, match="train has no books"):
        prepare("pg19", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no vocabulary of 32000 ids"):
        prepare("pg19", pg19(tmp_path / "small"), tmp_path / "out")


def test_imagenet_becomes_interleaved_in_the_order_of_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", 2)
    pictures = imagenet(tmp_path / "net", *[1] * 9, 24)  # batch 10 comes after batch 9
    prepare("imagenet64", tmp_path / "net", tmp_path / "out")
    corpus = open_corpus(tmp_path / "out")
    assert (corpus.kind, corpus.picture_shape) == ("image", (64, 64, 3))
    train = np.concatenate(pictures[:-1])
    wanted = train[:31], train[31:], pictures[-1]  # the last 33 // 16 for validation
    for split, images in zip((corpus.train, corpus.validation, corpus.test), wanted, strict=True):
        got = np.frombuffer(split.text(), np.uint8).reshape(-1, 64, 64, 3)
        assert np.array_equal(got, images)
        assert not split.has_ends and len(split.tokens) == images.size
    batch = Lanes(corpus.train, 2, 3).next_batch()
    assert batch.targets[:, :3].tolist() == [(train[i, 0, 0] + 3).tolist() for i in (0, 15)]
    assert batch.inputs[:, 0].tolist() == [END, END]


def test_the_official_number_of_training_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imagenet(tmp_path / "net", 5)
    for official, n_train in ((3, 3), (4, 4), (5, 4), (6, 4)):
        monkeypatch.setattr(module, "_OFFICIAL_TRAIN_IMAGES", official)
        facts = prepare("imagenet64", tmp_path / "net", tmp_path / f"out{official}")
        counts = [facts["splits"][s]["n_documents"] for s in ("train", "validation", "test")]
        assert counts == [n_train, 5 - n_train, 3]


def rewrite(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def change_inside(path: Path, change: Callable[[bytes], bytes]) -> None:
    """A sound archive with an array that is not what its head says."""
    with zipfile.ZipFile(path) as opened:
        content = opened.read("data.npy")
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("data.npy", change(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)


def pickled(path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([{}], object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("data.npy", buffer.getvalue())


ONES = np.ones((2, 12288), np.uint8)
SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:30_000]), "not a zip file"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip file"),
    "flipped": (flip, "CRC"),
    "short": (lambda path: change_inside(path, lambda c: c[:-5]), "ends 2 pictures early"),
    "long": (lambda path: change_inside(path, lambda c: c + b"x"), "longer than its header"),
    "version": (lambda path: change_inside(path, lambda c: c[:6] + b"\3" + c[7:]), "version 3"),
    "pickle": (pickled, "data is object"),
    "float": (lambda path: rewrite(path, data=ONES.astype(np.float32)), "data is float32"),
    "flat": (lambda path: rewrite(path, data=ONES.ravel()), r"data is uint8 \(24576,\)"),
    "32x32": (lambda path: rewrite(path, data=ONES[:, :3072]), "wanted uint8"),
    "none": (lambda path: rewrite(path, data=ONES[:0]), "wanted uint8"),
    "fortran": (lambda path: rewrite(path, data=np.asfortranarray(ONES)), "column by column"),
    "other": (lambda path: rewrite(path, images=ONES), "data.npy"),
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_batch_that_is_damaged_is_named(tmp_path: Path, kind: str) -> None:
    imagenet(tmp_path / "net", 2, 2)
    spoil, message = SPOILERS[kind]
    spoil(tmp_path / "net" / "train_data_batch_2.npz")
    with pytest.raises(ValueError, match=f"train_data_batch_2.npz is damaged.*{message}"):
        prepare("imagenet64", tmp_path / "net", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_folder_that_is_not_imagenet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 0 train_data_batch.*no val_data.npz"):
        prepare("imagenet64", tmp_path, tmp_path / "out")
    imagenet(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="has 1 training pictures, wanted at least 2"):
        prepare("imagenet64", tmp_path / "one", tmp_path / "out")
    (tmp_path / "one" / "train_data_batch_x.npz").touch()
    with pytest.raises(ValueError, match="batch_x.npz has no number"):
        prepare("imagenet64", tmp_path / "one", tmp_path / "out")


def album(root: Path, n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {f"{i % 3}/{i}.png": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(n)}
    for name, image in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(image, root / name)
    return made


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    made = album(tmp_path / "album", 20)
    (tmp_path / "album" / ".hidden").write_text("no picture")
    (tmp_path / "album" / "link.png").symlink_to(tmp_path / "album" / "0" / "0.png")
    facts = prepare("pictures", tmp_path / "album", tmp_path / "out", size=8)
    corpus = open_corpus(tmp_path / "out")
    assert corpus.picture_shape == (8, 8, 3) and facts["skipped"] == 0
    splits = corpus.train, corpus.validation, corpus.test
    assert [split.n_documents for split in splits] == [18, 1, 1]
    got = np.concatenate([np.frombuffer(s.text(), np.uint8).reshape(-1, 192) for s in splits])
    order = sorted(made, key=module._hash_of_name)
    assert np.array_equal(got, np.stack([made[name].ravel() for name in order]))


def test_pictures_that_are_none_stop_it_or_are_skipped(tmp_path: Path) -> None:
    album(tmp_path / "album", 30)
    (tmp_path / "album" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="notes.txt is not a picture"):
        prepare("pictures", tmp_path / "album", tmp_path / "out", size=8)
    assert [p.name for p in tmp_path.iterdir()] == ["album"]
    facts = prepare("pictures", tmp_path / "album", tmp_path / "out", size=8, skip_bad=True)
    assert facts["skipped"] == 1
    assert sum(split["n_documents"] for split in facts["splits"].values()) == 30
    (tmp_path / "few").mkdir()
    with pytest.raises(ValueError, match="has 0 files, wanted at least 3"):
        prepare("pictures", tmp_path / "few", tmp_path / "out2")


def test_many_sources_are_one_line_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_SOURCES", 4)
    album(tmp_path / "album", 5)
    facts = prepare("pictures", tmp_path / "album", tmp_path / "out", size=8)
    (entry,) = facts["sources"]
    files = [p for p in (tmp_path / "album").rglob("*.png")]
    assert (entry["files"], entry["size"]) == (5, sum(p.stat().st_size for p in files))


@pytest.mark.parametrize("change", ["touch", "grow", "shrink", "remove"])
def test_a_source_that_changes_meanwhile_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"x" * 1000)
    read = module._Sources.blocks

    def spoiling(self: Any, file: Path) -> Any:
        yield from read(self, file)
        if change == "touch":
            os.utime(path, ns=(0, 0))
        elif change == "remove":
            path.unlink()
        else:
            path.write_bytes(b"x" * (2000 if change == "grow" else 10))

    monkeypatch.setattr(module._Sources, "blocks", spoiling)
    with pytest.raises(ValueError, match="raw changed while it was read"):
        prepare("enwik8", path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_too_little_disk_stops_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 1000)
    monkeypatch.setattr("vqlm.prepared._MARGIN", 10**18)
    monkeypatch.setattr(module._Sources, "blocks", None)
    with pytest.raises(OSError, match="free some, or choose another disk"):
        prepare("enwik8", tmp_path / "raw", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_what_is_asked_for_must_exist(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 19)
    for name, source, options, error, message in (
        ("enwik9", "raw", {}, ValueError, "unknown data set 'enwik9'; did you mean 'enwik8'"),
        ("enwik8", "raw", {"size": 3}, ValueError, "unknown option of enwik8 'size'"),
        ("pg19", ".", {"vocab": 3}, ValueError, "did you mean 'vocab_size'"),
        ("enwik8", ".", {}, FileNotFoundError, "is not a file"),
        ("pictures", "raw", {}, FileNotFoundError, "is not a folder"),
        ("enwik8", "raw", {}, ValueError, "has 19 bytes, wanted at least 20"),
    ):
        with pytest.raises(error, match=message):
            prepare(name, tmp_path / source, tmp_path / "out", **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="out is not empty"):
        prepare("enwik8", tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("pictures", "size", value) for value in ("abc", 8.0, [8], True, 0, 10**400)]
    + [("pictures", "skip_bad", value) for value in ("maybe", 1)]
    + [("pg19", "vocab_size", value) for value in ("none", -1)]
    + [("pg19", "sample_bytes", value) for value in ("x", 0)],
)
def test_options_are_of_their_type(tmp_path: Path, name: str, option: str, value: Any) -> None:
    wanted = "true or false" if option == "skip_bad" else "a whole number, "
    with pytest.raises(ValueError, match=f"prepare {name}: {option}=.* wanted {wanted}"):
        prepare(name, tmp_path, tmp_path / "out", **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_reference_data_of_every_kind(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    for name, folder in (("enwik8", "enwik_mini"), ("imagenet64", "imagenet64-mini")):
        prepare(name, shared_data(f"data/{folder}"), tmp_path / name)
    text_splits = open_corpus(tmp_path / "enwik8")
    assert text_splits.train.n_bytes == 5_480_771
    data = np.load(shared_data("data/imagenet64-mini/val_data.npz"))["data"][7]
    tokens = open_corpus(tmp_path / "imagenet64").test.tokens[7 * 12288 : 8 * 12288]
    assert np.array_equal(tokens.reshape(4096, 3) - 3, data.reshape(3, 4096).T)
