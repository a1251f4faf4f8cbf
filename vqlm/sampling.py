"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUCLEUS_SLACK = 1e-4
"""The official rule keeps the smallest set of tokens with mass at least p - 1e-4."""


def nucleus(probability: Float[Tensor, "B N"], top_p: float) -> Bool[Tensor, "B N"]:
    """Which tokens stay: those with less than ``top_p`` - 1e-4 of mass ranked above them.

    The top token always stays (Holtzman et al. 2020, as Transformer-VQ applies it).
    """
    ranked, order = probability.sort(-1, descending=True)
    above = ranked.cumsum(-1) - ranked
    keep = above < top_p - NUCLEUS_SLACK
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter(-1, order, keep)


def pick(
    logits: Float[Tensor, "B N"],
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " B"]:
    """Draws one token a row; ``temperature`` 0 takes the most probable.

    Raises:
        ValueError: no temperature of at least 0, or ``top_p`` outside (0, 1].
    """
    if not temperature >= 0:  # so that not-a-number is refused too
        raise ValueError(f"temperature={temperature}, but it must be 0 (greedy) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}, but it must be in (0, 1]; 1 keeps every token")
    if temperature == 0:
        return logits.argmax(-1)
    # The largest is 0 before it is divided: the least temperature makes it no infinity, and one
    # that float32 rounds to 0 no 0 / 0.
    logits = logits.float()
    limits = torch.finfo(torch.float32)
    divisor = min(max(temperature, limits.tiny), limits.max)
    probability = ((logits - logits.amax(-1, keepdim=True)) / divisor).softmax(-1)
    if top_p < 1:
        probability = probability * nucleus(probability, top_p)
    return torch.multinomial(probability, 1, generator=generator)[:, 0]
