"""Text comes back from its ids byte by byte, and every id knows how many bytes it is."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tiny import text

from vqlm.vocabulary import (
    BYTES,
    END,
    MODEL_FILE,
    N_SPECIAL,
    PAD,
    UNKNOWN,
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
    train_sentencepiece,
)

# Compounds of two words, ten a line.
WORDS = "".join(text(3000).decode().split(" ")[i] + " " * (i % 2) for i in range(3000)).split()
SAMPLE = "\n".join(" ".join(WORDS[i : i + 10]) for i in range(0, len(WORDS), 10))


@pytest.fixture(scope="module")
def pieces() -> SentencePieceVocabulary:
    return train_sentencepiece([SAMPLE], size=524, sample_bytes=100_000)


def train(**settings: object) -> bytes:
    """A model as others may train it."""
    model = io.BytesIO()
    usual: dict[str, object] = dict(
        model_type="bpe", vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2, model_writer=model,
    )  # fmt: skip
    SentencePieceTrainer.train(sentence_iterator=iter(SAMPLE.splitlines()), **usual | settings)
    return model.getvalue()


def check(vocabulary: Vocabulary, content: bytes) -> None:
    ids = vocabulary.encode(content)
    assert ids.dtype == np.uint16
    assert vocabulary.decode(ids) == content
    assert vocabulary.token_bytes[ids].sum() == len(content)
    assert not np.isin(ids, [PAD, END, UNKNOWN]).any()


# What SentencePiece treats in ways of its own, mixed with what it has pieces for.
odd = st.lists(
    st.sampled_from(
        ["\n", "\t", " ", "  ", "\u2581", "\0", "\r\n", "\U0001f600", "\ufb01", "e\u0301", "\ufeff"]
        + [
            "<s>",
            "</s>",
            "<unk>",
            "<pad>",
            "<0x41>",
            "code",
            " vector",
            "\u00a0",
            "\u3000",
            "\u2028",
        ]
    )
).map("".join)


@given(st.text() | odd)
def test_sentencepiece_loses_nothing(pieces: SentencePieceVocabulary, content: str) -> None:
    check(pieces, content.encode())


@given(st.text(alphabet="ab \n\u2581", max_size=200) | odd)
def test_words_one_by_one_are_the_text_as_a_whole(
    pieces: SentencePieceVocabulary, content: str
) -> None:
    parts = [pieces._processor.encode(part) for part in content.split("\u2581")]
    space = pieces.encode("\u2581".encode()).tolist()
    want = parts[0] + [i for part in parts[1:] for i in space + part]
    assert pieces.encode(content.encode()).tolist() == want


def test_a_piece_may_reach_across_words() -> None:
    phrases = train(split_by_whitespace=False, vocab_size=400)
    vocabulary = SentencePieceVocabulary(phrases)
    ids = vocabulary.encode(SAMPLE.encode())
    assert ids.tolist() == vocabulary._processor.encode(SAMPLE)
    assert any(b" " in vocabulary.decode([i]).strip() for i in set(ids.tolist()))
    check(vocabulary, "a \u2581 b\n".encode())


@given(st.binary())
def test_bytes_lose_nothing(content: bytes) -> None:
    check(BYTES, content)


def test_pieces_are_shorter_than_bytes_and_ids_are_in_place(
    pieces: SentencePieceVocabulary,
) -> None:
    assert (pieces.kind, pieces.size) == ("sentencepiece", 524)
    assert (BYTES.kind, BYTES.size) == ("bytes", 259)
    assert len(pieces.encode(SAMPLE.encode())) < len(SAMPLE) / 3
    for vocabulary in (pieces, BYTES):
        table = vocabulary.token_bytes
        assert table.shape == (vocabulary.size,) and table[:N_SPECIAL].tolist() == [0, 0, 0]
        assert (table[N_SPECIAL:] >= 1).all()
        assert not table.flags.writeable
        assert vocabulary.decode([PAD, *vocabulary.encode(b"a b").tolist(), END]) == b"a b"
        assert vocabulary.decode([]) == b""
        for wrong in ([vocabulary.size], [-1]):
            with pytest.raises(ValueError, match=f"wanted 0 to {vocabulary.size - 1}"):
                vocabulary.decode(wrong)


def test_newlines_are_tokens_of_their_own(pieces: SentencePieceVocabulary) -> None:
    ids = pieces.encode(b"code\n\nvector")
    assert [pieces.decode([i]) for i in ids.tolist()] == [b"code", b"\n", b"\n", b"vector"]


def test_text_that_is_not_utf8_is_refused(pieces: SentencePieceVocabulary) -> None:
    with pytest.raises(ValueError, match=r"not UTF-8: .* at byte 3 \(0xff\)"):
        pieces.encode(b"abc\xff")


def test_the_same_text_gives_the_same_vocabulary_and_only_the_sample_counts() -> None:
    n = SAMPLE.index("\n", 2000) + 1
    made = [
        train_sentencepiece(texts, 400, n)
        for texts in ([SAMPLE], [SAMPLE[:n], "never read\n" * 1000], [SAMPLE[:n] * 9])
    ]
    first, *others = [[v.decode([i]) for i in range(400)] for v in made]
    assert others == [first, first]
    assert [
        v.decode([i]) for v in (train_sentencepiece([SAMPLE], 400),) for i in range(400)
    ] != first


def test_training_refuses_what_cannot_be(pieces: SentencePieceVocabulary) -> None:
    with pytest.raises(ValueError, match="no vocabulary of 5000 ids.*smaller.*<= "):
        train_sentencepiece([SAMPLE], 5000)
    for size, sample in ((259, 1), (65_537, 1), (512, 0)):
        with pytest.raises(ValueError, match="wanted a size of 260 to 65536"):
            train_sentencepiece([SAMPLE], size, sample)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("book 7 is not UTF-8")])
def test_what_goes_wrong_while_reading_is_not_hidden(error: BaseException) -> None:
    def texts() -> Iterator[str]:
        yield SAMPLE
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        train_sentencepiece(texts(), 520)


def test_a_vocabulary_is_saved_and_found(tmp_path: Path, pieces: SentencePieceVocabulary) -> None:
    assert isinstance(load_vocabulary(tmp_path), ByteVocabulary)
    pieces.save(tmp_path)
    again = load_vocabulary(tmp_path)
    assert again.kind == "sentencepiece"
    assert again.encode(SAMPLE.encode()).tolist() == pieces.encode(SAMPLE.encode()).tolist()
    assert [p.name for p in tmp_path.iterdir()] == [MODEL_FILE]
    (tmp_path / MODEL_FILE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{MODEL_FILE}: not a SentencePiece model"):
        load_vocabulary(tmp_path)
    BYTES.save(tmp_path)
    assert isinstance(load_vocabulary(tmp_path), ByteVocabulary)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pad_id=-1, eos_id=2, unk_id=0, bos_id=1), "wanted"),
        (dict(byte_fallback=False, vocab_size=60), "0 ids of single bytes"),
        (dict(normalization_rule_name="nfkc"), "it changes text"),
        (dict(add_dummy_prefix=True), "it changes text"),
        (dict(remove_extra_whitespaces=True), "it changes text"),
    ],
)
def test_models_that_lose_something_are_refused(settings: dict, message: str) -> None:
    model = train(**settings)
    with pytest.raises(ValueError, match=message):
        SentencePieceVocabulary(model)


@pytest.mark.parametrize("model", [b"", b"junk"])
def test_what_is_no_model_is_refused(model: bytes) -> None:
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceVocabulary(model)
