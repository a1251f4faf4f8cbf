"""Text and pictures out of a model, as they are made."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vqlm.model import LM, LMState
from vqlm.prefix import Prefix
from vqlm.vocabulary import BYTES, END, N_SPECIAL, Vocabulary


def stream_text(
    model: LM,
    prompt: bytes,
    n_token: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    vocabulary: Vocabulary = BYTES,
    prefix: Prefix | None = None,
) -> Iterator[str]:
    """Continues ``prompt`` (which may be empty) by up to ``n_token`` tokens, piece by piece.

    ``prefix``: what was read before the prompt; None: a document begins with the prompt.
    Ends early where the model ends the document.  Bytes that are no UTF-8 become U+FFFD.

    Raises:
        ValueError: a negative ``n_token``, no seed of 64 bits, or settings that ``sampling.pick``
            refuses.
    """
    if n_token < 0:
        raise ValueError(f"n_token={n_token}, but it must be 0 or more")
    rows, state = _begin(model, [prompt], vocabulary, prefix)
    tokens = model.stream(
        rows, n_token, temperature=temperature, top_p=top_p, generator=_generator(model, seed),
        state=state, forbidden=_without_meaning(model, vocabulary),
    )  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token, _ in tokens:
        value = int(token)
        if value == END:
            break
        if piece := decoder.decode(vocabulary.decode([value])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def sample_texts(
    model: LM,
    prompt: bytes,
    n_token: int,
    count: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    vocabulary: Vocabulary = BYTES,
    prefix: Prefix | None = None,
) -> list[str]:
    """``count`` continuations of one prompt, made side by side, without the prompt; as
    ``stream_text`` otherwise.

    Raises:
        ValueError: a number that is too small, no seed of 64 bits, or settings that
            ``sampling.pick`` refuses.
    """
    if n_token < 1 or count < 1:
        raise ValueError(f"n_token={n_token} and count={count}, but both must be at least 1")
    rows, state = _begin(model, [prompt] * count, vocabulary, prefix)
    tokens = model.stream(
        rows, n_token, temperature=temperature, top_p=top_p, generator=_generator(model, seed),
        state=state, forbidden=_without_meaning(model, vocabulary),
    )  # fmt: skip
    drawn = torch.stack([token for token, _ in tokens], 1).tolist()
    cut = [row[: row.index(END)] if END in row else row for row in drawn]
    return [vocabulary.decode(row).decode("utf-8", "replace") for row in cut]


def sample_pictures(
    model: LM,
    shape: tuple[int, int, int],
    count: int,
    known: UInt8[np.ndarray, "count n"] | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UInt8[np.ndarray, "count h w 3"]:
    """``count`` pictures, made side by side, byte by byte in raster order.

    Args:
        shape: (height, width, 3).
        known: the first n bytes of each picture, to be completed; None: from nothing.
        progress: called with the bytes made of each picture, and how many there will be.

    Raises:
        ValueError: more known bytes than a picture has, or settings that are out of range.
    """
    size = int(np.prod(shape))
    if known is None:
        known = np.zeros((count, 0), np.uint8)
    if count < 1 or known.shape[1] >= size:
        raise ValueError(
            f"sample_pictures: got count={count} and {known.shape[1]} known bytes, wanted at least "
            f"1 and fewer than the {size} bytes of a picture"
        )
    rows = _prompt(model, [row.tobytes() for row in known], BYTES)
    never = _without_meaning(model, BYTES)
    never[:N_SPECIAL] = True
    tokens = model.stream(
        rows, size - known.shape[1], temperature=temperature, top_p=top_p,
        generator=_generator(model, seed), forbidden=never,
    )  # fmt: skip
    made = []
    for token, _ in tokens:
        made.append(token)
        progress(len(made), size - known.shape[1])
    drawn = (torch.stack(made, 1).cpu().numpy() - N_SPECIAL).astype(np.uint8)
    return np.concatenate([known, drawn], 1).reshape(count, *shape)


def _begin(
    model: LM, prompts: list[bytes], vocabulary: Vocabulary, prefix: Prefix | None
) -> tuple[Tensor, LMState | None]:
    """Prompts of one length as ids, and the state that they are read after."""
    rows = _prompt(model, prompts, vocabulary)
    if prefix is None:
        return rows, None
    forks = prefix.forked(len(prompts))
    return forks.start(rows[:, 1:]), forks.state


def _prompt(model: LM, prompts: list[bytes], vocabulary: Vocabulary) -> Tensor:
    """Prompts of one length as ids, after the start symbol."""
    device = next(model.parameters()).device
    ids = [[END, *vocabulary.encode(prompt).tolist()] for prompt in prompts]
    return torch.tensor(ids, device=device)


def _without_meaning(model: LM, vocabulary: Vocabulary) -> Tensor:
    """[N] the ids that a padded model can draw and ``vocabulary`` can't read."""
    device = next(model.parameters()).device
    return torch.arange(model.config.vocab_size, device=device) >= vocabulary.size


def _generator(model: LM, seed: int | None) -> torch.Generator:
    generator = torch.Generator(next(model.parameters()).device)
    if seed is None:
        generator.seed()
    elif -(2**63) <= seed < 2**64:
        generator.manual_seed(seed)
    else:
        raise ValueError(f"seed={seed}, but it must have 64 bits at most; choose a smaller one")
    return generator
