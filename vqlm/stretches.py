"""A long call of the language model, read stretch by stretch and computed again so in the backward
pass: what is kept of a stretch is the state before it, of constant size, so that a training step
needs the memory of one stretch, whatever the length, and its tensors stay as small.

Softmax can't do this: its keys and values are the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vqlm.config import LMConfig
from vqlm.outputs import LMOutput, LMState, Scored
from vqlm.vq import VQAux

Read = Callable[..., LMOutput | Scored]
"""A call of a model, given ``state`` and other arguments by name."""


def require_stretch(config: LMConfig, stretch: int, is_cut: bool) -> None:
    """Says no to a ``stretch`` with which a step would not be that of one call.

    Raises:
        ValueError: it would cut blocks of "vq", a layer's state grows, or the sequences are cut
            over processes.
    """
    if "vq" in config.mixers and stretch % config.block:
        raise ValueError(
            f"LM: stretches of {stretch} tokens would cut the blocks of {config.block} that "
            "gradients of 'vq' layers depend on; choose a multiple"
        )
    if "softmax" in config.mixers:
        raise ValueError(
            "LM: a 'softmax' layer's state grows with the text, so stretches save no memory; "
            "compute layer by layer again (checkpoint_tokens: null), or choose another mixer"
        )
    if is_cut:
        raise ValueError(
            "LM: sequences that are cut over processes can't be read in stretches; "
            "set checkpoint_tokens to null, or sequence_parallel to 1"
        )


def in_stretches(
    read: Read, stretch: int, state: LMState, by_token: Mapping[str, Any], **others: Any
) -> LMOutput | Scored:
    """What ``read`` gives for all tokens, ``stretch`` of them at a time.

    ``by_token``: arguments [B, T] by name, which are cut; ``others``: those that are not.
    """
    n_token = next(x.shape[1] for x in by_token.values() if x is not None)
    parts: list[LMOutput | Scored] = []
    for begin in range(0, n_token, stretch):
        cut = {
            name: None if x is None else x[:, begin : begin + stretch]
            for name, x in by_token.items()
        }
        call = partial(read, state=state, **cut, **others)
        parts.append(checkpoint(call, use_reentrant=False))
        state = parts[-1].state
    aux = tuple(_joined(layer) for layer in zip(*(part.aux for part in parts), strict=True))
    first = [part[0] for part in parts]
    if isinstance(parts[0], Scored):
        return Scored(torch.stack(first).sum(), state, aux)
    return LMOutput(torch.cat(first, 1), state, aux)


def _joined(parts: tuple[VQAux | None, ...]) -> VQAux | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    stats = found[0].stats
    for part in found[1:]:
        stats = None if stats is None or part.stats is None else stats.merge(part.stats)
    return VQAux(torch.stack([part.commitment for part in found]).sum(), stats)
