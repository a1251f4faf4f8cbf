"""What a playground remembers of its users: one state each, of constant size, and never their text.

A session's work is cut in slices, a few tokens each, which one thread does in turn; so users wait
for each other no longer than a slice, and the model is never used by two at a time.
"""

from __future__ import annotations

import asyncio
import codecs
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from vqlm.model import LM, LMState
from vqlm.vocabulary import BYTES, END, PAD, UNKNOWN, Vocabulary

T = TypeVar("T")

READ_TOKENS = 512
"""Tokens of a text that one slice reads."""

SLICE_TOKENS, SLICE_SECONDS = 64, 0.05
"""A slice of writing ends after so many tokens, or so much time."""


@dataclass(frozen=True)
class Limits:
    """The most that one playground gives.

    Raises:
        ValueError: a limit below 1.
    """

    body_bytes: int = 256 * 1024
    """Bytes of a request's body."""
    new_tokens: int = 10_000
    """Tokens that one request may have written."""
    position: int = 2**24
    """Tokens of one text, read and written."""
    sessions: int = 64
    """Texts that are remembered; then the one not used for longest is forgotten."""
    streams: int = 32
    """Requests that read or write at a time."""
    idle_seconds: float = 3600
    """Time without use after which a text is forgotten."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 1:
                raise ValueError(f"Limits: {name}={value}, but it must be at least 1")


class Refused(Exception):
    """A request that is not done; ``status`` is the HTTP status, the text says the way out."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Wish(NamedTuple):
    """What is to be written."""

    n_token: int
    """Tokens, at least 1."""
    temperature: float = 0.8
    """0 takes the most probable token."""
    top_p: float = 0.95
    """Nucleus; 1 keeps every token."""
    seed: int | None = None
    """For the same text again; None: drawn anew."""
    may_end: bool = False
    """Whether the model may end the document; the text then starts anew."""


class Piece(NamedTuple):
    """What one slice of writing made."""

    text: str
    """May be empty: a character can take several tokens."""
    n_token: int
    """Tokens written in this slice."""
    ended: bool
    """Whether the document has ended with it."""


class Session:
    """One text: the state after all but its newest tokens, and those.

    Everything but ``stop`` is called by one thread at a time.
    """

    def __init__(self, model: LM, vocabulary: Vocabulary = BYTES) -> None:
        self._model, self._vocabulary = model, vocabulary
        self.busy, self.stopped, self.used = False, False, 0.0
        self.forget()

    def forget(self) -> None:
        """Starts a new text."""
        self.position = 0
        """Tokens of the text, read and written."""
        self._state: LMState | None = None
        self._unread = [END]  # tokens that the state does not hold yet
        self._held = b""  # bytes that may be a part of a word
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def state_bytes(self) -> int:
        """Size of all that is remembered of the text, in bytes."""
        return self._model.state_bytes() if self._state is None else self._state.bytes()

    def tokens_of(self, text: bytes, more: bool = False) -> list[int]:
        """Token ids of ``text``; of ``more`` to come, a last word that may go on is held back.

        Raises:
            ValueError: a text that the vocabulary cannot hold, or too long a word.
        """
        text, self._held = self._held + text, b""
        if more and self._vocabulary.kind != "bytes":
            cut = max(text.rfind(b" "), text.rfind(b"\n"))
            if cut <= 0 and len(text) > 1 << 20:
                raise ValueError("1 MiB of text without a space or line end; word pieces need them")
            text, self._held = text[: max(cut, 0)], text[max(cut, 0) :]
        return self._vocabulary.encode(text).tolist() if text else []

    def read(self, tokens: list[int]) -> Iterator[int]:
        """Takes in ``tokens``, slice by slice; yields how many were read so far."""
        self._decoder.reset()
        for begin in range(0, len(tokens), READ_TOKENS):
            if self.stopped:
                return
            part = tokens[begin : begin + READ_TOKENS]
            *read, last = self._unread + part
            with torch.inference_mode():
                if read:
                    self._state = self._model(self._row(read), self._state).state
            self._unread = [last]
            self.position += len(part)
            yield begin + len(part)

    def write(self, wish: Wish) -> Generator[Piece, None, None]:
        """Goes on with the text, slice by slice."""
        if self._held:
            for _ in self.read(self.tokens_of(b"")):
                pass
        generator = torch.Generator(self._device())
        generator.manual_seed(secrets.randbits(63) if wish.seed is None else wish.seed)
        never = [PAD, UNKNOWN] if wish.may_end else [PAD, UNKNOWN, END]
        # A padded model could draw ids that the vocabulary does not have.
        forbidden = torch.arange(self._model.config.vocab_size) >= self._vocabulary.size
        forbidden[never] = True
        stream = self._model.stream(
            self._row(self._unread), wish.n_token,
            temperature=float(wish.temperature), top_p=float(wish.top_p),
            generator=generator, state=self._state, forbidden=forbidden.to(self._device()),
        )  # fmt: skip
        made: list[int] = []
        began = time.monotonic()
        for token, state in stream:
            value = int(token)
            if value == END:
                text = self._text(made, final=True)
                self.forget()
                yield Piece(text, len(made) + 1, ended=True)
                return
            self._state, self._unread = state, [value]
            self.position += 1
            made.append(value)
            if len(made) == SLICE_TOKENS or time.monotonic() - began > SLICE_SECONDS:
                yield Piece(self._text(made), len(made), ended=False)
                if self.stopped:
                    return
                made, began = [], time.monotonic()
        if made:
            yield Piece(self._text(made), len(made), ended=False)

    def _text(self, tokens: list[int], final: bool = False) -> str:
        return self._decoder.decode(self._vocabulary.decode(tokens), final)

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _row(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self._device())


class Pool:
    """All sessions of a playground, and the one thread that works for them in turn."""

    def __init__(
        self,
        make: Callable[[], Session],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self.limits, self._clock = make, limits, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the least recently used first
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vqlm-play")
        self.working = 0
        """Requests that read or write now."""

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self) -> str:
        """Makes a session; its secret name is all that lets one use it.

        Raises:
            Refused: all sessions are at work.
        """
        self._expire()
        if len(self._sessions) >= self.limits.sessions:
            idle = next((name for name, s in self._sessions.items() if not s.busy), None)
            if idle is None:
                raise Refused(503, "all texts are in use; try again in a minute")
            del self._sessions[idle]
        name = secrets.token_urlsafe(16)
        self._sessions[name] = self._make()
        self._sessions[name].used = self._clock()
        return name

    def get(self, name: str) -> Session:
        """The session called ``name``, now the most recently used.

        Raises:
            Refused: there is none, or not any more.
        """
        self._expire()
        if name not in self._sessions:
            raise Refused(404, "this text is no longer remembered; start a new one")
        self._sessions.move_to_end(name)
        self._sessions[name].used = self._clock()
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Forgets a session; one that is at work ends with its slice."""
        if name in self._sessions:
            self._sessions.pop(name).stopped = True

    def _expire(self) -> None:
        oldest = self._clock() - self.limits.idle_seconds
        for name in [n for n, s in self._sessions.items() if s.used < oldest and not s.busy]:
            del self._sessions[name]

    def claim(self, session: Session) -> None:
        """Marks a session as at work; ``release`` ends that.

        Raises:
            Refused: it is at work already, or too many others are.
        """
        if session.busy:
            raise Refused(409, "this text is being read or written already; stop that first")
        if self.working >= self.limits.streams:
            raise Refused(503, f"{self.working} texts are being worked on; try again in a minute")
        session.busy, session.stopped = True, False
        self.working += 1

    def release(self, session: Session) -> None:
        """The counterpart of ``claim``."""
        session.busy, session.used = False, self._clock()
        self.working -= 1

    async def do(self, function: Callable[..., T], *args: Any) -> T:
        """Has the worker call ``function``, after all that was asked of it before."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    def later(self, function: Callable[[], object]) -> None:
        """Has the worker call ``function`` after all that was asked of it before."""
        with suppress(RuntimeError):  # it has been shut down
            self._worker.submit(function)

    async def slices(self, work: Iterator[T]) -> AsyncIterator[T]:
        """What ``work`` yields, each slice in its turn among those of others."""
        nothing = object()
        while (item := await self.do(next, work, nothing)) is not nothing:
            yield item

    def shut_down(self) -> None:
        """Ends the worker after the slice that it is at."""
        for session in self._sessions.values():
            session.stopped = True
        self._worker.shutdown(cancel_futures=True)
