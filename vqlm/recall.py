"""Recall tasks: what must be remembered of a context, drawn without end from a seed.

    basic       pairs of key and value, then keys alone: which value?
    sparse      the same, with filler between the pairs: most of a context is not worth keeping
    positional  every key comes several times; a question names key and number of the occurrence
    regression  triples f, x, y with y = a_f x + b_f: in-context learning of many linear functions
    needle      a sentence with a number somewhere in real text, and a question for it at the end

A batch is a context and then questions.  The context is filled up at its front so that it ends at a
multiple of ``ALIGN`` tokens: with chunks that divide it the open chunk of OVQ-attention is empty
when questions begin, and can't answer for the dictionary.  (Of "regression" every triple is asked
for as it comes, so it has no questions apart.)

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
    _require_pairs(n_pair, N_KEY)
    key = _KEY0 + _distinct(n_row, N_KEY, n_pair, generator)
    value = _VALUE0 + torch.randint(N_VALUE, (n_row, n_pair), generator=generator)
    at = _distinct(n_row, gap * n_pair, n_pair, generator).sort(1).values
    body = _FILLER0 + torch.randint(N_FILLER, (n_row, gap * n_pair, 2), generator=generator)
    body.scatter_(1, at[..., None].expand(-1, -1, 2), torch.stack([key, value], -1))
    asked = _distinct(n_row, n_pair, min(n_pair, MOST_ASKED), generator)
    question = key.gather(1, asked)[..., None]
    return _join(body.flatten(1), question, value.gather(1, asked), 2 * at.gather(1, asked) + 1)


def positional(n_pair: int, n_row: int, generator: torch.Generator) -> Examples:
    """``n_pair`` pairs of n_pair / 4 keys, each with four values; "which was the second of k?"."""
    _require_pairs(n_pair, N_KEY)
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
    """``n_triple`` triples of n_triple / 8 functions; y is asked for of every triple whose function
    has come with two other x before, which tell it.

    x, a and b are whole numbers, uniform from -4, -2 and -4 to 4, 2 and 4.
    """
    _require_pairs(n_triple, N_KEY)
    n_function = max(1, n_triple // 8)
    which = torch.randint(n_function, (n_row, n_triple), generator=generator)
    name = _KEY0 + _distinct(n_row, N_KEY, n_function, generator)

    def drawn(most: int, n: int) -> Int[Tensor, "B n"]:
        return torch.randint(-most, most + 1, (n_row, n), generator=generator)

    a, b, x = drawn(SLOPE, n_function), drawn(OFFSET, n_function), drawn(PLACE, n_triple)
    y = a.gather(1, which) * x + b.gather(1, which)
    body = torch.stack([name.gather(1, which), _X0 + x, _Y0 + y], -1)
    tokens = body.flatten(1)
    same = (which[:, :, None] == which[:, None]).tril(-1)
    index = torch.arange(n_triple)
    before = torch.where(same, index, -1).amax(-1)
    other = same & (x[:, None] != x.gather(1, before.clamp(min=0))[..., None])
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, 1::3] = other.any(-1)
    distance = torch.zeros_like(tokens)
    distance[:, 1::3] = 3 * (index - before)
    return Examples(tokens, tokens.roll(-1, 1), counted, distance * counted, tokens.shape[1])


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


def curriculum(size: int, start: int = 4) -> list[int]:
    """Sizes to train at one after another: doubling from ``start`` to ``size``."""
    sizes = [size]
    while sizes[0] // 2 >= start:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _require_pairs(n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise ValueError(f"recall: size {n}, but it must be from 1 to {most}, the number of keys")


def _distinct(n_row: int, n: int, k: int, generator: torch.Generator) -> Int[Tensor, "B k"]:
    """``k`` different numbers below ``n`` in each row, in random order."""
    return torch.rand(n_row, n, generator=generator).argsort(1)[:, :k]


def _join(
    body: Int[Tensor, "B T"],
    question: Int[Tensor, "B P Q"],
    answer: Int[Tensor, "B P"],
    source: Int[Tensor, "B P"],
) -> Examples:
    """Filler, ``body``, and questions each followed by its answer.  ``source``: the answer's place
    in ``body``."""
    front = -body.shape[1] % ALIGN
    filler = body.new_full((len(body), front), FILLER)
    asked = torch.cat([question, answer[..., None]], -1).flatten(1)
    n_context = front + body.shape[1]
    tokens = torch.cat([filler, body, asked], 1)
    width = question.shape[2] + 1
    at = n_context + width * torch.arange(answer.shape[1]) + width - 2
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    counted[:, at] = True
    distance = torch.zeros_like(tokens)
    distance[:, at] = at + 1 - (front + source)
    return Examples(tokens, tokens.roll(-1, 1), counted, distance, n_context)
