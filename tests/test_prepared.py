"""A prepared folder is there whole or not at all, is mapped, and says when it is damaged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import text

from vqlm import prepared
from vqlm.data import END, Lanes, Split, encode, evaluation_batches, load_corpus
from vqlm.prepared import MANIFEST, SPLITS, PreparedWriter, open_corpus, verify
from vqlm.vocabulary import BYTES, MODEL_FILE, train_sentencepiece

DOCUMENTS = {
    "train": [b"one two", b"3", b"four five six " * 9],
    "validation": [b"seven"],
    "test": [b"eight", b"9"],
}
SOURCES = [{"name": "x", "size": 1, "sha256": "0"}]


def write(folder: Path, **settings: Any) -> dict[str, Any]:
    with PreparedWriter(folder, "corpus", BYTES, **settings) as writer:
        for split in SPLITS:
            for document in DOCUMENTS[split]:
                writer.add(split, encode(document), len(document.split()))
        return writer.publish(SOURCES)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_written_is_what_is_opened(tmp_path: Path) -> None:
    manifest = write(tmp_path / "new" / "data")
    corpus = open_corpus(str(tmp_path / "new" / "data"))
    assert (corpus.name, corpus.kind, corpus.picture_shape) == ("corpus", "text", None)
    assert manifest["sources"] == SOURCES
    for split in SPLITS:
        got, want = getattr(corpus, split), Split.from_documents(DOCUMENTS[split])
        assert np.array_equal(got.tokens, want.tokens)
        assert np.array_equal(got.document_offsets, want.document_offsets)
        assert (got.n_documents, got.n_bytes, got.text()) == (
            want.n_documents, want.n_bytes, want.text(),
        )  # fmt: skip
        assert got.n_words == sum(len(d.split()) for d in DOCUMENTS[split])
        assert got.has_ends and got.names == ()
        # Mapped, not loaded: what is under the array is a file, which cannot be written through.
        assert isinstance(got.tokens.base, np.memmap) and not got.tokens.flags.writeable
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["data"]
    assert {p.name for p in (tmp_path / "new" / "data").iterdir()} == {MANIFEST, *manifest["files"]}
    assert verify(tmp_path / "new" / "data") == sum(f["size"] for f in manifest["files"].values())


def test_batches_are_those_of_the_same_text_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "data")
    got, want = open_corpus(tmp_path / "data").train, Split.from_documents(DOCUMENTS["train"])
    lanes = Lanes(got, 2, 5), Lanes(want, 2, 5)
    pairs = [tuple(lane.next_batch() for lane in lanes) for _ in range(20)]
    for settings in ({}, {"max_bytes": 30}, {"context_len": 7}):
        batches = [evaluation_batches(split, 2, 5, **settings) for split in (got, want)]
        pairs += zip(*batches, strict=True)
    for a, b in pairs:
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a.n_bytes == b.n_bytes


def test_documents_may_come_in_parts_and_without_ends(tmp_path: Path) -> None:
    with PreparedWriter(tmp_path / "data", "x", BYTES, has_ends=False) as writer:
        for split in SPLITS:
            for part in (b"ab", b"", b"cde"):
                writer.write(split, encode(part))
            writer.end_document(split)
            writer.add(split, encode(b"f"))
        writer.publish([])
    split = open_corpus(tmp_path / "data").test
    assert split.text() == b"abcdef" and END not in split.tokens
    assert split.document_offsets.tolist() == [0, 5, 6]
    assert (split.n_bytes, split.n_words, split.has_ends) == (6, None, False)


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    def make(folder: Path, n: int) -> None:
        with PreparedWriter(folder, "x", BYTES, has_ends=False, picture_shape=(2, 3, 3)) as writer:
            for split in SPLITS:
                writer.add(split, encode(bytes(n)))
            writer.publish([])

    make(tmp_path / "good", 18)
    corpus = open_corpus(tmp_path / "good")
    assert (corpus.kind, corpus.picture_shape) == ("image", (2, 3, 3))
    make(tmp_path / "bad", 17)
    with pytest.raises(ValueError, match="pictures of another size"):
        open_corpus(tmp_path / "bad")


def test_a_learned_vocabulary_travels_with_the_data(tmp_path: Path) -> None:
    vocabulary = train_sentencepiece(["\n".join(text(9).decode() for _ in range(9))], 280)
    with PreparedWriter(tmp_path / "data", "x", vocabulary) as writer:
        for split in SPLITS:
            writer.add(split, vocabulary.encode(b"state linear"))
        writer.publish([])
    corpus = open_corpus(tmp_path / "data")
    assert (corpus.vocabulary.kind, corpus.vocabulary.size) == ("sentencepiece", 280)
    assert corpus.test.text() == b"state linear" and corpus.test.n_bytes == 12
    verify(tmp_path / "data")
    edit(tmp_path / "data", lambda m: m["vocabulary"].update(size=281))
    with pytest.raises(ValueError, match="its vocabulary is sentencepiece of 280 ids"):
        open_corpus(tmp_path / "data")
    (tmp_path / "data" / MODEL_FILE).unlink()
    with pytest.raises(ValueError, match=f"{MODEL_FILE} has None bytes"):
        open_corpus(tmp_path / "data")


def test_the_fingerprint_is_of_the_contents(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    edit(tmp_path / "b", lambda m: m.update(name="other", sources=[]))
    monkeypatch.setitem(DOCUMENTS, "test", [b"eight", b"8"])
    write(tmp_path / "c")
    a, b, c = (open_corpus(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_other_sources_are_read_as_ever(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b"text %d" % i)
    (tmp_path / MANIFEST).write_text('{"format": "of something else"}')
    assert open_corpus(tmp_path).fingerprint == load_corpus(tmp_path).fingerprint
    assert open_corpus(None).name.startswith("stdlib-")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_corpus(tmp_path / "none")


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "format version 2, this vqlm reads 1": lambda m: m.update(version=2),
    "does not say format": lambda m: m.update(format="vqlm"),
    "has no 'files'": lambda m: m.pop("files"),
    "has no 'name'": lambda m: m.update(name=3),
    "kind 'sound'": lambda m: m.update(kind="sound"),
    "kind 'image' with picture_shape None": lambda m: m.update(kind="image"),
    "kind 'text' with picture_shape": lambda m: m.update(picture_shape=[1, 1, 3]),
    "no counts of split 'test'": lambda m: m["splits"].pop("test"),
    "no counts of split 'train'": lambda m: m["splits"]["train"].update(n_tokens=-1),
    "lacks has_ends": lambda m: m["splits"]["train"].update(has_ends="yes"),
    "lacks has_ends or n_words": lambda m: m["splits"]["train"].update(n_words=1.5),
    "train.tokens.bin is not of 5 numbers": lambda m: m["splits"]["train"].update(n_tokens=5),
    "train.offsets.bin is not of 3": lambda m: m["splits"]["train"].update(n_documents=2),
    "does not list": lambda m: m["files"].update({"../../secret": {"size": 1, "sha256": ""}}),
    "does not list .*test.tokens.bin": lambda m: m["files"].update({"test.tokens.bin": {}}),
    "has 274 bytes, wanted 3": lambda m: m["files"]["train.tokens.bin"].update(size=3),
    "its vocabulary is bytes of 259": lambda m: m["vocabulary"].update(size=300),
}


@pytest.mark.parametrize("message", BAD_MANIFESTS)
def test_a_manifest_that_is_wrong(tmp_path: Path, message: str) -> None:
    write(tmp_path / "data")
    open_corpus(tmp_path / "data")
    edit(tmp_path / "data", BAD_MANIFESTS[message])
    with pytest.raises(ValueError, match=message):
        open_corpus(tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "data")
    (tmp_path / "data" / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match="damaged prepared data.*prepare the data again"):
        open_corpus(tmp_path / "data")


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path / "data")
    path = tmp_path / "data" / "train.tokens.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="train.tokens.bin has 273 bytes, wanted 274"):
        open_corpus(tmp_path / "data")
    path.write_bytes(b"\5" + content[1:])
    open_corpus(tmp_path / "data")  # contents are not read
    with pytest.raises(ValueError, match="train.tokens.bin is damaged: its sha256"):
        verify(tmp_path / "data")
    path.write_bytes(content)
    offsets = tmp_path / "data" / "train.offsets.bin"
    for wrong in ([0, 9, 8, 137], [1, 8, 10, 137], [0, 8, 10, 136], [0, 8, 8, 137]):
        offsets.write_bytes(np.array(wrong, "<i8").tobytes())
        with pytest.raises(ValueError, match="borders of documents out of order"):
            open_corpus(tmp_path / "data")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), None])
def test_whatever_happens_nothing_half_written_stays(
    tmp_path: Path, error: BaseException | None
) -> None:
    with pytest.raises(type(error) if error else ValueError):
        with PreparedWriter(tmp_path / "data", "x", BYTES) as writer:
            writer.add("train", encode(b"x" * 100_000))
            if error:
                raise error
            writer.publish([])  # validation and test are empty
    assert list(tmp_path.iterdir()) == []
    with PreparedWriter(tmp_path / "data", "x", BYTES):
        pass  # never published
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(prepared._Output):
        def write(self, content: bytes) -> None:
            if len(content) > 1000:
                raise OSError(28, "No space left on device")
            super().write(content)

    monkeypatch.setattr(prepared, "_Output", Full)
    with pytest.raises(OSError, match="data: the disk filled up; nothing was prepared"):
        with PreparedWriter(tmp_path / "data", "x", BYTES) as writer:
            writer.add("train", encode(b"x" * 1000))
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_told_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="needs about 1000000.0 GB more.*free; free some"):
        with PreparedWriter(tmp_path / "data", "x", BYTES) as writer:
            writer.require_space(1000)
            writer.require_space(10**15)


def test_documents_are_complete_and_not_empty(tmp_path: Path) -> None:
    with PreparedWriter(tmp_path / "data", "x", BYTES) as writer:
        with pytest.raises(ValueError, match="an empty document in split 'test'"):
            writer.add("test", encode(b""))
        for split in SPLITS:
            writer.add(split, encode(b"x"))
        writer.write("test", encode(b"y"))
        with pytest.raises(ValueError, match="'test' has 1 complete documents.*none begun"):
            writer.publish([])


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(ValueError, match="not empty|a file or a link"):
            write(tmp_path / name)
    open_corpus(tmp_path / "empty")
    with pytest.raises(OSError):
        with PreparedWriter(tmp_path / "late", "x", BYTES) as writer:
            for split in SPLITS:
                writer.add(split, encode(b"x"))
            (tmp_path / "late").mkdir()
            (tmp_path / "late" / "mine").write_text("mine")
            writer.publish([])
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "file", "link", "late"}
    assert [p.name for p in (tmp_path / "late").iterdir()] == ["mine"]


def test_two_at_once_are_refused_and_left_overs_removed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from vqlm.prepared import *\n"
        "from vqlm.vocabulary import BYTES\n"
        "with PreparedWriter(Path(sys.argv[1]), 'x', BYTES) as writer:\n"
        "    writer.add('train', BYTES.encode(b'x' * 9))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    with PreparedWriter(tmp_path / "data", "x", BYTES):
        with pytest.raises(ValueError, match="another process is preparing"):
            write(tmp_path / "data")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data")], cwd=os.getcwd())
    assert run.returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == [".data.partial"]
    (tmp_path / ".data.partial" / "other").write_bytes(b"of a killed one")
    write(tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert not (tmp_path / "data" / "other").exists()
    verify(tmp_path / "data")
