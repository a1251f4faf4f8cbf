"""Bits per byte and perplexities of a split: state is carried, sums are divided once at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqlm.codebook import CodeStats, merge_layers
from vqlm.data import PAD, Batch, Split, evaluation_batches
from vqlm.kept import evaluating
from vqlm.model import LM, LMState


@dataclass(frozen=True)
class Evaluation:
    """Sums over a split, and how its keys used the codebooks."""

    nats: float
    """Total negative log-likelihood, ends of documents included, in nats."""
    n_tokens: int
    """Predicted tokens, ends of documents included."""
    n_bytes: int
    """Bytes of text."""
    codebooks: tuple[CodeStats | None, ...]
    """One a layer, without samples; None where the mixer has no codebook."""
    n_words: int | None = None
    """Words by the corpus's official count; None: not known, or only a part was read."""

    @property
    def bits_per_byte(self) -> float:
        """Bits spent for each byte of text; what ends of documents cost is charged to the text."""
        return self.nats / (math.log(2) * self.n_bytes)

    @property
    def token_perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.nats / self.n_tokens, 700.0))

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats per word): comparable across vocabularies, as PG-19's papers report it."""
        if self.n_words is None:
            return None
        return math.exp(min(self.nats / self.n_words, 700.0))

    def codes_in_use(self) -> list[float]:
        """Perplexity of code use of each VQ layer, the mean over its heads."""
        return [stats.perplexity().mean().item() for stats in self.codebooks if stats is not None]

    def summary(self) -> dict[str, object]:
        """Plain numbers for JSON and logs."""
        books = [stats for stats in self.codebooks if stats is not None]
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_token": self.nats / self.n_tokens,
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "n_words": self.n_words,
            "codes_in_use": [round(x, 1) for x in self.codes_in_use()],
            "dead_codes": [int(stats.dead().sum()) for stats in books],
            "quantization_error": [round(s.relative_error().mean().item(), 4) for s in books],
        }


@torch.inference_mode()
def evaluate(
    model: LM,
    split: Split,
    *,
    batch_size: int = 16,
    seq_len: int = 512,
    max_bytes: int | None = None,
    context_len: int | None = None,
    share: slice = slice(None),  # noqa: B008  (immutable)
    total: Callable[[list[Tensor]], list[Tensor]] = list,
) -> Evaluation:
    """Reads ``split`` once, every document from its start with all of its context.

    The result does not depend on ``batch_size`` or ``seq_len``, which only cost memory; nor does
    memory grow with the length of the text.  ``max_bytes``: the first documents only.
    ``context_len``: forget everything after so many tokens; None: at document starts alone.
    ``share``: rows to read, where other processes read the others, in as many calls of the model;
    ``total``: the sums, tensors on the CPU, over all of them.

    Raises:
        ValueError: a size below 1.
    """
    device = next(model.parameters()).device
    nats, n_tokens, n_bytes = 0.0, 0, 0
    state: LMState | None = None
    books: tuple[CodeStats | None, ...] = ()
    batches = evaluation_batches(split, batch_size, seq_len, max_bytes, context_len)
    with evaluating(model):
        for batch in batches:
            batch = _rows(batch, share, split).to(device)
            # A single document has no padding, and then there is nothing to pack.
            mask = None if batch.mask.all() else batch.mask
            out = model(
                batch.inputs, state, mask=mask, starts=batch.starts, with_stats=True,
                targets=batch.targets,
            )  # fmt: skip
            state = out.state
            # Summed up in Python's float64, which not every device has.
            nats += out.nats.item()
            n_tokens += int(batch.mask.sum())
            n_bytes += batch.n_bytes
            seen = tuple(s._replace(sample=s.sample[:, :0]) if s else None for s in out.stats())
            books = merge_layers(books, seen) if books else seen
    numbers = torch.tensor([nats, n_tokens, n_bytes], dtype=torch.float64)
    sums = [x.cpu() for book in books if book is not None for x in book[:-1]]
    numbers, *sums = total([numbers, *sums])
    rest = iter(sums)
    books = tuple(
        None
        if book is None
        else CodeStats._make([*(next(rest) for _ in book[:-1]), book.sample.cpu()])
        for book in books
    )
    n_words = split.n_words if max_bytes is None else None
    return Evaluation(numbers[0].item(), int(numbers[1]), int(numbers[2]), books, n_words)


def _rows(batch: Batch, share: slice, split: Split) -> Batch:
    """Some rows of a batch; one of padding alone if that are none."""
    if share == slice(None):
        return batch
    inputs, targets, starts, mask = (x[share] for x in batch[:4])
    if len(inputs) == 0:
        inputs = targets = torch.full_like(batch.inputs[:1], PAD)
        starts = mask = torch.zeros_like(batch.mask[:1])
    n_bytes = int(split.token_bytes[targets[mask].numpy()].sum())
    return Batch(inputs, targets, starts, mask, n_bytes)
