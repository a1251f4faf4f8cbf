"""Models of equal size whatever their mixers: the SwiGLU makes up for the difference."""

from __future__ import annotations

import dataclasses

import torch

from vqlm.config import LMConfig
from vqlm.model import LM

WIDTH_STEP = 8
"""Widths of SwiGLUs are multiples of this."""


class Impossible(ValueError):
    """Sizes that no model can have."""


def outline(config: LMConfig) -> tuple[LM, int]:
    """A model on the meta device, which has no numbers, and the bytes of one row's state.

    Raises:
        Impossible: no model can have such sizes.
    """
    try:
        with torch.device("meta"):
            lm = LM(config)
            return lm, lm.init_state(1).bytes()
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise Impossible(str(error).split("\n")[0]) from error


def n_learned(config: LMConfig) -> int:
    """Learned numbers of a model: parameters and codebooks."""
    with torch.device("meta"):
        lm = LM(config)
    return sum(x.numel() for x in lm.state_dict().values())


def fitted(config: LMConfig, target: int) -> LMConfig:
    """``config`` with the width of the SwiGLU at which ``n_learned`` is nearest to ``target``.

    Raises:
        ValueError: layers without a SwiGLU, a model that is too large without one, or fewer layers
            than the pattern of mixers has.
    """
    if config.n_layer < len(config.mixers):
        raise ValueError(
            f"mixers {'+'.join(config.mixers)} want {len(config.mixers)} layers or more, but "
            f"n_layer={config.n_layer}, and the last would be in none; choose a larger n_layer"
        )
    if config.layer != "swiglu":
        raise ValueError(f"layer={config.layer!r} has no SwiGLU to adapt; use layer=swiglu")
    widths = (WIDTH_STEP, 2 * WIDTH_STEP)
    one, two = (n_learned(dataclasses.replace(config, d_ff=width)) for width in widths)
    width = WIDTH_STEP * (1 + round((target - one) / (two - one)))
    if width < WIDTH_STEP:
        raise ValueError(
            f"mixers {'+'.join(config.mixers)} have at least {one:,} parameters at "
            f"d_model={config.d_model}, and {target:,} are wanted; choose a larger d_ff"
        )
    return dataclasses.replace(config, d_ff=width)
