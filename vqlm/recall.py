"""Recall tasks: what must be remembered of a context, drawn without end from a seed.

    basic       pairs of key and value, then keys alone: which value?
    sparse      the same, with filler between the pairs: most of a context is not worth keeping
    positional  every key comes several times; a question names key and number of the occurrence
    regression  triples f, x, y with y = a_f x + b_f: in-context learning of many linear functions
    needle      a sentence with a number somewhere in real text, and a question for it at the end

A batch is a context and then questions.  The context is filled up at its front so that it ends at a
multiple of ``ALIGN`` tokens: with chunks that divide it the open chunk of OVQ-attention is empty
when questions begin, and can't answer for the dictionary.  After a question comes filler in place
of its answer: who saw the answers could tell others from them, if only by what is left (of four
pairs asked for one after another, 52% are right so, and mixers were found to learn nothing else).

Axes: B batch, T time, P pairs or other things to remember.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vqlm.config import require_known
from vqlm.data import Split, encode

ALIGN = 64
"""Contexts end at multiples of so many tokens."""

MOST_ASKED = 32
"""Questions about a context, at most."""

FILLER, N_KEY, N_VALUE, OCCURRENCES = 0, 1024, 64, 4
SLOPE, OFFSET, PLACE = 2, 4, 4
"""Functions of "regression" are y = a x + b of whole numbers, the largest of which these are."""

_KEY0 = 1
_VALUE0 = _KEY0 + N_KEY
_RANK0 = _VALUE0 + N_VALUE
_FILLER0 = _RANK0 + OCCURRENCES
_X0 = _VALUE0 + PLACE
_Y0 = _X0 + PLACE + 1 + SLOPE * PLACE + OFFSET
N_FILLER = 64
VOCAB_SIZE = _FILLER0 + N_FILLER
"""Token ids of every task but "needle", which is in bytes."""


class Examples(NamedTuple):
    """A batch of one task."""

    tokens: Int[Tensor, "B T"]
    """What the model reads."""
    targets: Int[Tensor, "B T"]
    """What it should say after each; arbitrary where not counted."""
    counted: Bool[Tensor, "B T"]
    """Where an answer is due."""
    distance: Int[Tensor, "B T"]
    """Tokens between an answer and the place where it could be read; 0 where not counted."""
    n_context: int
    """Tokens before the questions."""


Draw = Callable[[int, int, torch.Generator], Examples]


def basic(n_pair: int, n_row: int, generator: torch.Generator) -> Examples:
    """``n_pair`` pairs one after another; all are asked for, but no more than ``MOST_ASKED``."""
    return _pairs(n_pair, n_row, generator, gap=1)


def sparse(n_pair: int, n_row: int, generator: torch.Generator) -> Examples:
    """As ``basic`` with three in four places of a pair taken by filler of 64 kinds."""
    return _pairs(n_pair, n_row, generator, gap=4)


def _pairs(n_pair: int, n_row: int, generator: torch.Generator, gap: int) -> Examples:
    _require_size(n_pair, 1, N_KEY)
    key = _KEY0 + _distinct(n_row, N_KEY, n_pair, generator)
    value = _VALUE0 + torch.randint(N_VALUE, (n_row, n_pair), generator=generator)
    at = _distinct(n_row, gap * n_pair, n_pair, generator).sort(1).values
    body = _FILLER0 + torch.randint(N_FILLER, (n_row, gap * n_pair, 2), generator=generator)
    body.scatter_(1, at[..., None].expand(-1, -1, 2), torch.stack([key, value], -1))
    asked = _distinct(n_row, n_pair, min(n_pair, MOST_ASKED), generator)
    question = key.gather(1, asked)[..., None]
    return _join(body.flatten(1), question, value.gather(1, asked), 2 * at.gather(1, asked) + 1)


def positional(n_pair: int, n_row: int, generator: torch.Generator) -> Examples:
    """``n_pair`` pairs of n_pair / 4 keys, each with four values; "which was the second of k?".

    Who knows a key's values, but not their order, is right with one answer in four.  What is no
    multiple of four is rounded down to one, but to four at least.
    """
    _require_size(n_pair, 1, N_KEY * OCCURRENCES)
    n_key = max(1, n_pair // OCCURRENCES)
    key = _KEY0 + _distinct(n_row, N_KEY, n_key, generator)
    shuffled = _distinct(n_row, n_key * OCCURRENCES, n_key * OCCURRENCES, generator)
    which = shuffled % n_key
    value = _VALUE0 + torch.randint(N_VALUE, which.shape, generator=generator)
    body = torch.stack([key.gather(1, which), value], -1).flatten(1)
    asked = _distinct(n_row, n_key * OCCURRENCES, min(n_pair, MOST_ASKED), generator)
    same = which[:, :, None] == which[:, None]
    rank = (same.tril(-1)).sum(-1)
    question = torch.stack([_RANK0 + rank, key.gather(1, which)], -1)
    question = question.gather(1, asked[..., None].expand(-1, -1, 2))
    return _join(body, question, value.gather(1, asked), 2 * asked + 1)


def regression(n_triple: int, n_row: int, generator: torch.Generator) -> Examples:
    """``n_triple`` triples of n_triple / 8 functions, then as many questions as triples, or
    ``MOST_ASKED``, for the y of a function at an x that it hasn't come with.

    x, a and b are whole numbers, uniform from -4, -2 and -4 to 4, 2 and 4.  Counted are functions
    that have come with two x, which tell them, and not with all; the distance is to the farther of
    the nearest two.
    """
    n_function = max(1, n_triple // 8)
    _require_size(n_triple, 2, N_KEY * 8)
    which = torch.randint(n_function, (n_row, n_triple), generator=generator)
    name = _KEY0 + _distinct(n_row, N_KEY, n_function, generator)

    def drawn(most: int, n: int) -> Int[Tensor, "B n"]:
        return torch.randint(-most, most + 1, (n_row, n), generator=generator)

    a, b, x = drawn(SLOPE, n_function), drawn(OFFSET, n_function), drawn(PLACE, n_triple)
    y = a.gather(1, which) * x + b.gather(1, which)
    body = torch.stack([name.gather(1, which), _X0 + x, _Y0 + y], -1).flatten(1)

    n_place = 2 * PLACE + 1
    come = torch.zeros(n_row, n_function * n_place, dtype=torch.bool)
    come = come.scatter(1, which * n_place + x + PLACE, True).unflatten(1, (n_function, n_place))
    n_asked = min(n_triple, MOST_ASKED)
    of = torch.randint(n_function, (n_row, n_asked), generator=generator)
    come = come.gather(1, of[..., None].expand(-1, -1, n_place))
    new = torch.rand(come.shape, generator=generator).masked_fill(come, -1).argmax(-1) - PLACE
    answer = a.gather(1, of) * new + b.gather(1, of)
    nearest = _last(which[:, None] == of[..., None])
    other = (which[:, None] == of[..., None]) & (x[:, None] != x.gather(1, nearest)[..., None])
    told = other.any(-1) & ~come.all(-1)
    question = torch.stack([name.gather(1, of), _X0 + new], -1)
    return _join(body, question, _Y0 + answer, 3 * _last(other) + 2, told)


def _last(true: Bool[Tensor, "B P T"]) -> Int[Tensor, "B P"]:
    """Index of the last true one, 0 where there is none."""
    return (true * torch.arange(true.shape[2])).amax(-1)


def needle(split: Split) -> Draw:
    """The task over the text of ``split``, in bytes: contexts of ``size`` tokens.

    Raises, when drawn from:
        ValueError: a size that is no multiple of ``ALIGN``, or not below the text's length.
    """

    def draw(size: int, n_row: int, generator: torch.Generator) -> Examples:
        if size % ALIGN:
            raise ValueError(f"needle: {size} tokens of context; want a multiple of {ALIGN}")
        n_text = len(split.tokens)
        if n_text <= size:
            raise ValueError(f"needle: the text has {n_text} tokens, a context {size}; shorten it")
        bodies, questions, answers, places = [], [], [], []
        for _ in range(n_row):
            name, number = torch.randint(10, (2, 4), generator=generator).tolist()
            digits = "".join(map(str, number))
            asked_for = "".join(chr(ord("a") + i) for i in name)
            question = encode(f"\nThe code of {asked_for} is ".encode()).tolist()
            answer = encode(digits.encode()).tolist()
            sentence = question + answer + encode(b".\n").tolist()
            n_hay = size - len(sentence)
            if n_hay < 1:
                raise ValueError(f"needle: {size} tokens; want more than {len(sentence)}")
            begin = int(torch.randint(n_text - n_hay, (1,), generator=generator))
            hay = split.tokens[begin : begin + n_hay].tolist()
            place = int(torch.randint(n_hay + 1, (1,), generator=generator))
            bodies.append(hay[:place] + sentence + hay[place:])
            questions.append(question)
            answers.append(answer)
            places.append(place + len(question))
        context = torch.tensor(bodies)
        asked, wanted = torch.tensor(questions), torch.tensor(answers)
        tokens = torch.cat([context, asked, wanted[:, :-1]], 1)
        first = context.shape[1] + asked.shape[1] - 1
        targets = tokens.roll(-1, 1)
        targets[:, first:] = wanted
        counted = torch.zeros_like(tokens, dtype=torch.bool)
        counted[:, first:] = True
        distance = counted * (first + 1 - torch.tensor(places))[:, None]
        return Examples(tokens, targets, counted, distance, size)

    return draw


TASKS: dict[str, Draw] = {
    "basic": basic, "sparse": sparse, "positional": positional, "regression": regression,
}  # fmt: skip
"""Tasks by name, but for "needle", which needs a text.  Each draws ``(size, rows, generator)``."""


def find(task: str, split: Split | None = None) -> Draw:
    """The task of this name; "needle" over ``split``.

    Raises:
        ValueError: an unknown name, or a needle without a text.
    """
    require_known("task", task, [*TASKS, "needle"])
    if task != "needle":
        return TASKS[task]
    if split is None:
        raise ValueError("needle: want a text to hide it in")
    return needle(split)


def curriculum(size: int, start: int = 4, multiple: int = 1) -> list[int]:
    """Sizes to train at one after another: doubling from ``start``, or the next that is a multiple
    of ``multiple``, to ``size``."""
    sizes = [size]
    while sizes[0] // 2 >= start and sizes[0] // 2 % multiple == 0:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _require_size(n: int, least: int, most: int) -> None:
    if not least <= n <= most:
        raise ValueError(
            f"recall: size {n}, but this task's must be from {least} to {most}, for which "
            f"{N_KEY} keys are enough"
        )


def _distinct(n_row: int, n: int, k: int, generator: torch.Generator) -> Int[Tensor, "B k"]:
    """``k`` different numbers below ``n`` in each row, in random order."""
    return torch.rand(n_row, n, generator=generator).argsort(1)[:, :k]


def _join(
    body: Int[Tensor, "B T"],
    question: Int[Tensor, "B P Q"],
    answer: Int[Tensor, "B P"],
    source: Int[Tensor, "B P"],
    counted: Bool[Tensor, "B P"] | None = None,
) -> Examples:
    """Filler, ``body``, and questions each followed by filler.

    ``source``: the answer's place in ``body``; ``counted``: which are, None: all.
    """
    front = -body.shape[1] % ALIGN
    filler = body.new_full((len(body), front), FILLER)
    after = torch.full_like(answer, FILLER)
    asked = torch.cat([question, after[..., None]], -1).flatten(1)
    n_context = front + body.shape[1]
    tokens = torch.cat([filler, body, asked], 1)
    width = question.shape[2] + 1
    at = n_context + width * torch.arange(answer.shape[1]) + width - 2
    due = torch.zeros_like(tokens, dtype=torch.bool)
    due[:, at] = True if counted is None else counted
    targets, distance = tokens.roll(-1, 1), torch.zeros_like(tokens)
    targets[:, at] = answer
    distance[:, at] = at + 1 - (front + source)
    return Examples(tokens, targets, due, distance * due, n_context)
