"""Batches of documents without END, of a learned vocabulary, and of files larger than memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import text

from vqlm.data import END, Batch, Lanes, Split, encode, evaluation_batches
from vqlm.vocabulary import SentencePieceVocabulary, train_sentencepiece

documents_strategy = st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=9)


def without_ends(documents: list[bytes]) -> Split:
    offsets = np.cumsum([0] + [len(d) for d in documents], dtype=np.int64)
    return Split(encode(b"".join(documents)), offsets, has_ends=False)


@pytest.fixture(scope="module")
def pieces() -> SentencePieceVocabulary:
    words = [text(10, seed).decode() for seed in range(40)]
    return train_sentencepiece(["\n".join(words)], 290)


def of_pieces(documents: list[bytes], vocabulary: SentencePieceVocabulary) -> Split:
    parts = [np.append(vocabulary.encode(d), np.uint16(END)) for d in documents]
    offsets = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)
    return Split(np.concatenate(parts), offsets, vocabulary=vocabulary)


def rows(batches: list[Batch]) -> list[list[tuple[int, int, bool]]]:
    """Input, target and start flag of every token of each row, padding left out."""
    found: list[list[tuple[int, int, bool]]] = [[] for _ in batches[0].inputs]
    for batch in batches:
        for r, t in batch.mask.nonzero().tolist():
            found[r].append(tuple(tensor[r, t].item() for tensor in batch[:3]))  # type: ignore
    return found


def as_read(document: bytes, context_len: int | None = None) -> list[tuple[int, int, bool]]:
    """What a model should see of a document, straight from the definition."""
    tokens = [byte + 3 for byte in document]
    n = context_len or len(tokens)
    return [
        (END if i % n == 0 else tokens[i - 1], token, i % n == 0) for i, token in enumerate(tokens)
    ]


@given(documents_strategy, st.integers(1, 7), st.integers(1, 30), st.none() | st.integers(1, 9))
def test_evaluation_without_ends(
    documents: list[bytes], batch_size: int, seq_len: int, context_len: int | None
) -> None:
    split = without_ends(documents)
    batches = list(evaluation_batches(split, batch_size, seq_len, context_len=context_len))
    got = [token for row in rows(batches) for token in row]
    want = [token for document in documents for token in as_read(document, context_len)]
    assert sorted(got) == sorted(want)
    assert sum(batch.n_bytes for batch in batches) == split.n_bytes == len(want)
    if batch_size == 1 and context_len is None:
        longest_first = sorted(documents, key=len, reverse=True)
        assert got == [token for document in longest_first for token in as_read(document)]


@given(documents_strategy, st.integers(1, 3), st.integers(1, 5))
def test_lanes_without_ends(documents: list[bytes], batch_size: int, seq_len: int) -> None:
    documents = [*documents, bytes(range(23))]  # never all of one length
    split = without_ends(documents)
    whole = [token for document in documents for token in as_read(document)]
    length = len(whole) // batch_size
    lanes = Lanes(split, batch_size, seq_len)
    for row, got in enumerate(rows([lanes.next_batch() for _ in range(9)])):
        want = [whole[row * length + t % length] for t in range(len(got))]
        want = [(i, o, s or t % length == 0) for t, (i, o, s) in enumerate(want)]
        assert got == want


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 5), st.integers(1, 11))
def test_a_lane_of_pictures_is_whole_pictures(
    batch_size: int, n: int, size: int, seq_len: int
) -> None:
    pictures = [bytes(size * i + j for j in range(size)) for i in range(n)]
    split = without_ends(pictures)
    each = n // batch_size
    if each * size < seq_len and each:
        with pytest.raises(ValueError, match="Lanes: got"):
            Lanes(split, batch_size, seq_len)
        return
    if not each:
        return
    lanes = Lanes(split, batch_size, seq_len)
    for row, got in enumerate(rows([lanes.next_batch() for _ in range(2 * n)])):
        lane = [t for p in pictures[row * each : (row + 1) * each] for t in as_read(p)]
        assert got == [lane[t % len(lane)] for t in range(len(got))]


def test_lanes_of_pictures_say_what_would_fit() -> None:
    split = without_ends([bytes(6)] * 10)
    Lanes(split, 5, 12)
    with pytest.raises(ValueError, match="at least 72 .*batch_size .* is 5, .*seq_len .* is 6$"):
        Lanes(split, 6, 7)
    # Texts that happen to be of one length are cut anywhere, as all texts are.
    Lanes(Split.from_documents([bytes(5)] * 10), 6, 10)
    # One long document, as enwik8 is, is cut anywhere.
    Lanes(without_ends([bytes(60)]), 7, 8)


def test_pieces_count_their_bytes(pieces: SentencePieceVocabulary) -> None:
    documents = [b"state linear code", b"vector window", "é model".encode()]
    split = of_pieces(documents, pieces)
    assert split.n_bytes == sum(map(len, documents)) > len(split.tokens)
    assert split.text() == b"".join(documents)
    batches = list(evaluation_batches(split, 2, 3))
    assert sum(batch.n_bytes for batch in batches) == split.n_bytes
    lanes = Lanes(split, 2, 2)
    for _ in range(5):
        batch = lanes.next_batch()
        assert batch.n_bytes == len(pieces.decode(batch.targets.flatten().numpy()))


@pytest.mark.parametrize("max_bytes", range(1, 45))
def test_max_bytes_counts_text_not_tokens(
    pieces: SentencePieceVocabulary, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqlm.data._CHUNK", 3)
    split = of_pieces([b"state linear code", b"vector window", b"model"], pieces)
    batches = list(evaluation_batches(split, 1, 100, max_bytes=max_bytes))
    n_taken = int(batches[0].mask.sum())
    n_bytes = np.cumsum(split.token_bytes[split.tokens])
    assert batches[0].n_bytes == n_bytes[n_taken - 1]
    assert n_taken == 1 or n_bytes[n_taken - 1] <= max_bytes
    assert n_taken == len(split.tokens) or n_bytes[n_taken] > max_bytes
    got = sorted(batches[0].targets[batches[0].mask].tolist())
    assert got == sorted(split.tokens[:n_taken].tolist())


class Watched(np.ndarray):
    """An array that remembers how many numbers were asked of it."""

    asked = 0

    def __getitem__(self, key: Any) -> Any:
        found = np.asarray(self)[key]
        Watched.asked += np.size(found)
        return found


def test_only_what_a_batch_needs_is_read() -> None:
    tokens = np.full(1_000_000, 7, np.uint16).view(Watched)
    split = Split(tokens, np.arange(0, 1_000_001, 100_000), has_ends=False)
    Watched.asked = 0
    lanes = Lanes(split, 4, 16)
    lanes.next_batch()
    assert 0 < Watched.asked <= 4 * 16 * 2
    Watched.asked = 0
    batches = evaluation_batches(split, 2, 32)
    assert Watched.asked == 0
    next(batches)
    assert 0 < Watched.asked <= 2 * 32 * 2
    Watched.asked = 0
    list(evaluation_batches(split, 2, 32, max_bytes=50))
    assert Watched.asked < 70_000  # one part of the split to count bytes, not all of it


def test_a_file_larger_than_memory_can_be_read(tmp_path: Path) -> None:
    n = 1 << 36  # 128 GB, of which the file system stores nothing
    path = tmp_path / "tokens"
    with open(path, "wb") as file:
        file.truncate(2 * n)
    tokens = np.asarray(np.memmap(path, "<u2", "r"))
    split = Split(tokens, np.array([0, n // 2, n]), has_ends=False, known_bytes=n)
    batch = Lanes(split, 3, 8, cursor=10**9).next_batch()
    assert batch.targets.shape == (3, 8)
    assert split.n_bytes == n and split.n_documents == 2
    first = next(evaluation_batches(split, 2, 8))
    assert torch.equal(first.starts, torch.tensor([[True] + [False] * 7] * 2))
