"""Ready-made models and trainings.  Each docstring is the lab note: what it is, what to expect."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from vqlm.config import LMConfig, TrainConfig, require_known

Preset = tuple[LMConfig, TrainConfig]


def demo() -> Preset:
    """Five and a half minutes on two CPU cores: 4 modern layers, 1.9 M parameters, on bytes.

    What ``make demo`` trains on the Python standard library's source text.
    """
    model = LMConfig(
        n_layer=4, d_model=192, n_head=2, d_k=64, d_v=96, n_code=64, window=64, block=128
    )
    train = TrainConfig(
        steps=10_000, minutes=5.5, batch_size=16, seq_len=128, learning_rate=3e-3,
        final_rate=0.02, precision="bfloat16", codebook_start="kmeans", revive_below=0.1,
        commitment=1e-2, eval_every=400, save_every=400,
    )  # fmt: skip
    return model, train


def mini() -> Preset:
    """Ten minutes on one CPU core: 4 modern layers, 2 M parameters, vqlm's codebook recipe.

    For comparisons of mixers and recipes on a small file of text; its quadratic twin is
    ``mini mixers=softmax``.
    """
    model = LMConfig(
        n_layer=4, d_model=192, n_head=3, d_k=64, d_v=64, n_code=128, window=64, block=64
    )
    train = TrainConfig(
        steps=700, batch_size=4, seq_len=512, context_len=2048, codebook_start="kmeans",
        revive_below=0.1, commitment=1e-2, eval_every=350, save_every=350,
    )  # fmt: skip
    return model, train


def mini_paper() -> Preset:
    """``mini`` with the paper's codebook recipe: short random codes, no revival, beta 1e-4."""
    model, train = mini()
    recipe = {"codebook_start": "random", "revive_below": 0.0, "commitment": 1e-4}
    return model, dataclasses.replace(train, **recipe)  # type: ignore[arg-type]


PRESETS: dict[str, Callable[[], Preset]] = {
    "demo": demo,
    "mini": mini,
    "mini-paper": mini_paper,
}


def get(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ValueError: an unknown name, with the nearest valid one.
    """
    require_known("preset", name, PRESETS)
    return PRESETS[name]()


def summaries() -> list[tuple[str, str]]:
    """Name and first line of the lab note of every preset."""
    return [(name, (inspect.getdoc(make) or "").split("\n")[0]) for name, make in PRESETS.items()]
