"""A playground's texts: cut, stopped and continued anywhere, they are what one reading gives."""

import asyncio
import codecs
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from playground import tiny_model
from tiny import MODEL
from torch.testing import assert_close

from vqlm.model import LM
from vqlm.sessions import READ_TOKENS, SLICE_TOKENS, Limits, Pool, Refused, Session, Wish
from vqlm.vocabulary import BYTES, END, N_SPECIAL, ByteVocabulary

TEXT = b"state linear code vector window means" * 40
GREEDY = Wish(50, temperature=0, top_p=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_ids_beyond_the_vocabulary_are_never_written() -> None:
    padded = LM(dataclasses.replace(MODEL, vocab_size=300)).eval()
    with torch.no_grad():
        padded.output.bias[259:] = 50.0
    pieces = list(Session(padded).write(Wish(9, seed=0)))
    assert sum(piece.n_token for piece in pieces) == 9 and "".join(p.text for p in pieces)


def read(session: Session, text: bytes) -> None:
    for _ in session.read(session.tokens_of(text)):
        pass


def write(session: Session, wish: Wish = GREEDY) -> bytes:
    return "".join(piece.text for piece in session.write(wish)).encode("utf-8", "replace")


def alone(model: Any, text: bytes, n_token: int) -> list[int]:
    """What the model writes after one reading, special tokens left out, drawn by hand."""
    tokens, state = torch.tensor([[END, *BYTES.encode(text).tolist()]]), None
    made: list[int] = []
    with torch.inference_mode():
        for _ in range(n_token):
            logits, state, _ = model(tokens, state)
            logits[..., :N_SPECIAL] = -torch.inf
            made.append(int(logits[0, -1].argmax()))
            tokens = torch.tensor([made[-1:]])
    return made


def test_any_cutting_gives_what_one_reading_gives(model: Any) -> None:
    # A letter that is not complete yet stays in the decoder.
    letters = codecs.getincrementaldecoder("utf-8")("replace")
    want = letters.decode(BYTES.decode(alone(model, TEXT, 50))).encode()
    ids = torch.tensor([[END, *BYTES.encode(TEXT).tolist()]])
    with torch.inference_mode():
        state = model(ids[:, :-1]).state  # the newest token is read when the next one is wanted
    for cuts in ([], [1], [3, 4, 700], list(range(0, len(TEXT), 97))):
        session = Session(model)
        for begin, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True):
            read(session, TEXT[begin:end])
        assert session.position == len(TEXT) > READ_TOKENS
        assert session._state is not None
        for got, wanted in zip(session._state.tensors(), state.tensors(), strict=True):
            assert_close(got, wanted)
        assert write(session) == want
        assert session.position == len(TEXT) + 50


def test_stopped_and_continued_it_writes_the_same(model: Any) -> None:
    whole, parts = Session(model), Session(model)
    for session in (whole, parts):
        read(session, b"code ")
    want = [piece.text for piece in whole.write(GREEDY._replace(n_token=3 * SLICE_TOKENS))]
    got = []
    for piece in parts.write(GREEDY._replace(n_token=3 * SLICE_TOKENS)):
        got.append(piece.text)
        parts.stopped = True
    assert 0 < parts.position - 5 <= SLICE_TOKENS
    parts.stopped = False
    rest = 5 + 3 * SLICE_TOKENS - parts.position
    got += [piece.text for piece in parts.write(GREEDY._replace(n_token=rest))]
    assert "".join(got) == "".join(want)


def test_reading_stops_between_slices(model: Any) -> None:
    session = Session(model)
    steps = session.read(session.tokens_of(b"x" * (3 * READ_TOKENS)))
    assert next(steps) == READ_TOKENS
    session.stopped = True
    assert list(steps) == [] and session.position == READ_TOKENS


def test_the_state_never_grows(model: Any) -> None:
    session = Session(model)
    sizes = {session.state_bytes()}
    for _ in range(3):
        read(session, TEXT)
        sizes.add(session.state_bytes())
        write(session)
        sizes.add(session.state_bytes())
    assert sizes == {model.state_bytes()}


def test_a_seed_repeats_a_text(model: Any) -> None:
    texts = [write(Session(model), Wish(60, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_end_begins_a_new_text_where_it_is_allowed(model: Any) -> None:
    ends = tiny_model()
    with torch.no_grad():
        ends.output.bias[END] = 1e3
    session = Session(ends)
    read(session, b"code ")
    pieces = list(session.write(Wish(9, may_end=True)))
    assert [(p.n_token, p.ended) for p in pieces] == [(1, True)] and session.position == 0
    assert write(session, GREEDY) == write(Session(ends), GREEDY)
    assert session.position == 50


def test_letters_of_several_bytes_come_whole(model: Any) -> None:
    spells = tiny_model()
    order = [b + N_SPECIAL for b in "é".encode()]
    with torch.no_grad():  # after any token: the byte that makes an é of it
        spells.output.weight.zero_()
        spells.output.bias.zero_()
        spells.output.bias[order[0]] = 5.0
    session = Session(spells)
    assert "".join(p.text for p in session.write(GREEDY)) == "�" * 49  # a lone first byte each
    session.forget()
    assert session._text([order[0]]) == "" and session._text([order[1]]) == "é"


class Words(ByteVocabulary):
    """A vocabulary that cannot cut within a word: a token for each."""

    kind = "words"

    def encode(self, text: bytes) -> Any:
        return np.array([3 + len(word) for word in text.split()], np.uint16)


def test_a_word_is_not_cut_between_two_parts(model: Any) -> None:
    session = Session(model, Words())
    assert session.tokens_of(b"one three fo", more=True) == [6, 8]
    assert session.tokens_of(b"ur", more=True) == []
    assert session.tokens_of(b" x") == [7, 4]
    session.tokens_of(b"five", more=True)
    session.forget()
    assert session.tokens_of(b" x") == [4]
    with pytest.raises(ValueError, match="without a space"):
        session.tokens_of(b"x" * (1 << 21), more=True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pool(model: Any, **limits: Any) -> tuple[Pool, Clock]:
    clock = Clock()
    return Pool(lambda: Session(model), Limits(**limits), clock), clock


def test_the_least_recently_used_text_makes_room(model: Any) -> None:
    texts, _ = pool(model, sessions=2)
    first, second = texts.open(), texts.open()
    texts.get(first)
    third = texts.open()
    assert len(texts) == 2 and texts.get(first) and texts.get(third)
    with pytest.raises(Refused, match="no longer remembered") as refused:
        texts.get(second)
    assert refused.value.status == 404


def test_a_text_at_work_is_kept(model: Any) -> None:
    texts, clock = pool(model, sessions=1, idle_seconds=10.0)
    name = texts.open()
    texts.claim(texts.get(name))
    clock.now = 100
    with pytest.raises(Refused, match="try again") as refused:
        texts.open()
    assert refused.value.status == 503
    texts.release(texts.get(name))
    assert texts.open() and len(texts) == 1


def test_idle_texts_are_forgotten(model: Any) -> None:
    texts, clock = pool(model, idle_seconds=10.0)
    old = texts.open()
    clock.now = 9
    texts.get(old)
    clock.now = 19.5
    with pytest.raises(Refused):
        texts.get(old)
    assert len(texts) == 0


def test_a_text_and_the_playground_are_claimed_within_bounds(model: Any) -> None:
    texts, _ = pool(model, streams=2)
    a, b, c = (texts.get(texts.open()) for _ in range(3))
    texts.claim(a)
    with pytest.raises(Refused) as refused:
        texts.claim(a)
    assert refused.value.status == 409
    texts.claim(b)
    with pytest.raises(Refused) as refused:
        texts.claim(c)
    assert refused.value.status == 503 and not c.busy
    texts.release(a)
    texts.claim(c)
    assert texts.working == 2


def test_work_is_done_in_turn(model: Any) -> None:
    texts, _ = pool(model)
    order: list[str] = []

    def work(name: str) -> Iterator[int]:
        for i in range(4):
            order.append(name)
            yield i

    async def all_of(name: str) -> list[int]:
        return [i async for i in texts.slices(work(name))]

    async def both() -> None:
        results = await asyncio.gather(all_of("a"), all_of("b"))
        assert results == [[0, 1, 2, 3]] * 2

    asyncio.run(both())
    texts.shut_down()
    assert order == ["a", "b"] * 4


def test_limits_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="streams=0, but it must be at least 1"):
        Limits(streams=0)
