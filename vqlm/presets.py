"""Ready-made models and trainings.  Each docstring is the lab note: what it is, what to expect.

Counts of parameters include the codebooks, as the paper's do.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from vqlm.config import LMConfig, TrainConfig, require_known

Preset = tuple[LMConfig, TrainConfig]

# What wins among codebook recipes (docs/results).  A strong commitment helps keys and codes to find
# each other and then holds the keys back, so it fades; codes that move slowly leave the keys alone.
_RECIPE: dict[str, Any] = {
    "codebook_start": "kmeans",
    "revive_below": 0.1,
    "commitment": 1e-2,
    "final_commitment": 0.01,
    "codebook_decay": 0.99,
}
_PAPER_RECIPE: dict[str, Any] = {
    "codebook_start": "random",
    "revive_below": 0.0,
    "commitment": 1e-4,
    "final_commitment": 1.0,
    "codebook_decay": 0.99,
}


def demo() -> Preset:
    """Five and a half minutes on two CPU cores: 4 modern layers, 1.9 M parameters, on bytes.

    What ``make demo`` trains on the Python standard library's source text.
    """
    model = LMConfig(
        n_layer=4, d_model=192, n_head=2, d_k=64, d_v=96, d_ff=448, n_code=64, window=64, block=128,
        output_gate=True,
    )  # fmt: skip
    train = TrainConfig(
        steps=10_000, minutes=5.5, batch_size=16, seq_len=128, learning_rate=3e-3,
        final_rate=0.02, precision="auto", eval_every=400, save_every=400, **_RECIPE,
    )  # fmt: skip
    return model, train


def mini() -> Preset:
    """Ten minutes on one CPU core: 4 modern layers, 2.1 M parameters, vqlm's codebook recipe.

    For comparisons of mixers and recipes on a small file of text; its quadratic twin is
    ``mini mixers=softmax``.
    """
    model = LMConfig(
        n_layer=4, d_model=192, n_head=3, d_k=64, d_v=64, n_code=128, window=64, block=64
    )
    train = TrainConfig(
        steps=700, batch_size=4, seq_len=512, context_len=2048, eval_every=350, save_every=350,
        **_RECIPE,
    )  # fmt: skip
    return model, train


def mini_paper() -> Preset:
    """``mini`` with the paper's codebook recipe: short random codes, no revival, beta 1e-4."""
    model, train = mini()
    return model, dataclasses.replace(train, **_PAPER_RECIPE)


def _gau(width: int, n_layer: int, *, d_k: int, n_code: int, window: int, **more: Any) -> LMConfig:
    """The paper's layers: one gated head, d_v = 2 d_model, block as long as the window."""
    return LMConfig(
        n_layer=n_layer, d_model=width, n_head=1, d_k=d_k, d_v=2 * width, n_code=n_code,
        window=window, block=window, layer="gau", **more,
    )  # fmt: skip


def _paper_training(steps: int, **more: Any) -> TrainConfig:
    """What the three experiments of the paper have in common."""
    return TrainConfig(
        steps=steps, batch_size=128, warmup_steps=10_000, warmup_apart=True, fixed_decay=True,
        beta1=0.9, beta2=0.98, adam_epsilon=1e-9, precision="auto", checkpointing=True,
        log_every=200, eval_every=1000, save_every=1000, **_PAPER_RECIPE, **more,
    )  # fmt: skip


# Adafactor's models share an embedding that starts with variance 1, hence the small scale.
_SHARED = {"tie_embedding": True, "output_scale": 0.005}


def enwik8() -> Preset:
    """The paper's enwik8: 48 gated layers, 187.7 M parameters (the paper says 190 M).

    Paper: 0.99 bits per byte on test.  Needs ``vqlm data prepare enwik8`` and eight large GPUs or
    ``accumulate``; not trained by us.  As in the paper but for bfloat16 sums, which are float32.
    """
    model = _gau(
        768, 48, d_k=128, n_code=512, window=512, final_norm=False, dropout_sinusoid=0.2,
        dropout_residual=0.5, dropout_layer=0.3,
    )  # fmt: skip
    train = _paper_training(
        125_000, seq_len=2048, context_len=8192, learning_rate=4e-4, clip_norm=0.1,
        weight_decay=2e-4, eval_bytes=5_000_000,
    )  # fmt: skip
    return model, train


def enwik8_small() -> Preset:
    """Bytes on one small GPU: 24 gated layers, 44.3 M parameters, vqlm's codebook recipe.

    A sibling of ``enwik8`` to try ideas with; not trained by us.
    """
    model = _gau(512, 24, d_k=128, n_code=512, window=256, dropout_layer=0.1)
    train = TrainConfig(
        steps=50_000, batch_size=16, seq_len=2048, accumulate=4, learning_rate=1e-3,
        warmup_steps=1000, precision="auto", checkpointing=True, log_every=50, eval_every=1000,
        save_every=1000, eval_bytes=1_000_000, **_RECIPE,
    )  # fmt: skip
    return model, train


def enwik8_mini() -> Preset:
    """Ten minutes on two CPU cores: 8 gated layers, 2.2 M parameters, on bytes of text.

    ``vqlm data prepare enwik8`` takes any file; what to expect: docs/results.
    """
    model = _gau(192, 8, d_k=64, n_code=128, window=64)
    return model, _mini_training(batch_size=16, seq_len=128)


def pg19() -> Preset:
    """The paper's PG-19: 48 gated layers, 1.31 G parameters with 32,000 pieces (the paper: 1.3 G).

    Paper: 26.6 perplexity per word on test.  Needs ``vqlm data prepare pg19``; not trained by us.
    """
    model = _gau(
        2048, 48, d_k=128, n_code=512, window=512, vocab_size=32_000, dropout_sinusoid=0.1,
        dropout_residual=0.1, dropout_layer=0.1, **_SHARED,
    )  # fmt: skip
    train = _paper_training(
        500_000, seq_len=2048, context_len=8192, optimizer="adafactor", learning_rate=0.01,
        clip_norm=None, weight_decay=0.0, eval_bytes=20_000_000,
    )  # fmt: skip
    return model, train


def pg19_small() -> Preset:
    """Books on one small GPU: 24 gated layers, 60.5 M parameters, vqlm's codebook recipe.

    A sibling of ``pg19`` to try ideas with; not trained by us.
    """
    model, train = enwik8_small()
    model = dataclasses.replace(model, vocab_size=32_000, tie_embedding=True, output_scale=0.05)
    return model, dataclasses.replace(train, seq_len=1024)


def pg19_mini() -> Preset:
    """Twelve minutes on two CPU cores: 8 gated layers, 2.9 M parameters (2,048 pieces), on books.

    After ``vqlm data prepare pg19 ... vocab_size=2048``; what to expect: docs/results.
    """
    model = _gau(192, 8, d_k=64, n_code=128, window=64, vocab_size=2048)
    return model, _mini_training(batch_size=16, seq_len=128, minutes=12.0)


def imagenet64() -> Preset:
    """The paper's ImageNet64: 48 gated layers, 1.25 G parameters (the paper: 1.2 G).

    Paper: 3.16 bits per byte.  Needs ``vqlm data prepare imagenet64``; not trained by us.
    """
    model = _gau(
        2048, 48, d_k=128, n_code=512, window=512, absolute_position=True, dropout_sinusoid=0.1,
        **_SHARED,
    )  # fmt: skip
    train = _paper_training(
        500_000, seq_len=1536, context_len=12_288, optimizer="adafactor", learning_rate=0.01,
        clip_norm=None, weight_decay=0.0, eval_bytes=12_800 * 12_288,
    )  # fmt: skip
    return model, train


def imagenet64_small() -> Preset:
    """Pictures on one small GPU: 24 gated layers, 44.3 M parameters, vqlm's codebook recipe.

    A sibling of ``imagenet64`` to try ideas with; not trained by us.
    """
    model, train = enwik8_small()
    model = dataclasses.replace(model, absolute_position=True, dropout_layer=0.0)
    return model, dataclasses.replace(train, seq_len=1536, context_len=12_288)


def imagenet64_mini() -> Preset:
    """Fifteen minutes on two CPU cores: 6 gated layers, 1.7 M parameters, on 64 x 64 pictures.

    A row of a picture is 192 bytes, so the window reaches the pixel above; what to expect:
    docs/results.
    """
    model = _gau(192, 6, d_k=64, n_code=128, window=256, absolute_position=True)
    train = _mini_training(batch_size=8, seq_len=512, context_len=12_288, minutes=15.0)
    return model, dataclasses.replace(train, eval_bytes=2 * 12_288)


def _hybrid(other: str) -> Preset:
    """OVQ's contest in small: rotary windows in turn with another mixer that has no positions, and
    whose keys are those of the token before."""
    model = LMConfig(
        n_layer=6, d_model=192, n_head=3, n_code=256, n_entry=256, window=128, block=128,
        chunk=64, mixers=("window", other), positions="rotary", conv_width=3, d_ff=448,
        output_gate=True, shifted_keys=True,
    )  # fmt: skip
    train = TrainConfig(
        steps=20_000, minutes=20.0, batch_size=4, seq_len=512, context_len=4096,
        learning_rate=3e-3, final_rate=0.02, eval_every=400, save_every=400, **_RECIPE,
    )  # fmt: skip
    return model, train


def sw_nope() -> Preset:
    """Rotary windows, full attention without positions: 6 modern layers, 2.8 M parameters.

    The paper's (Alonso et al. 2026) full-attention hybrid, for two CPU cores and bytes; its
    siblings ``sw-vq`` and ``sw-ovq`` differ in one word.  Twenty minutes; not trained by us yet.
    """
    return _hybrid("softmax")


def sw_vq() -> Preset:
    """``sw-nope`` with VQ-attention for the full one: 6 modern layers, 2.9 M parameters."""
    return _hybrid("vq")


def sw_ovq() -> Preset:
    """``sw-nope`` with OVQ-attention for the full one: 6 modern layers, 2.8 M parameters."""
    return _hybrid("ovq")


def contest() -> Preset:
    """Forty minutes a mixer on one CPU core: 6 modern layers, 2.8 M parameters, on books.

    What ``vqlm contest`` trains, with one mixer after another: ``sw-ovq`` with windows so short
    that what is behind them matters, two of them for each other layer, which has four times as
    many entries or codes; temperatures that are all learned, as OVQ's are; longer pieces of text.
    """
    model, train = _hybrid("ovq")
    model = dataclasses.replace(
        model, mixers=("window", "window", "ovq"), window=64, block=64, learned_temperature=True,
        n_entry=1024, n_code=1024,
    )  # fmt: skip
    train = dataclasses.replace(
        train, steps=3500, minutes=None, batch_size=2, seq_len=1024, context_len=4096,
        eval_every=250, save_every=100,
    )  # fmt: skip
    return model, train


def _mini_training(*, batch_size: int, seq_len: int, **more: Any) -> TrainConfig:
    settings = {"minutes": 10.0, "learning_rate": 3e-3, "final_rate": 0.02, **_RECIPE, **more}
    return TrainConfig(
        steps=20_000, batch_size=batch_size, seq_len=seq_len, precision="auto", eval_every=500,
        save_every=500,
        **settings,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Preset]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        demo, mini, mini_paper, enwik8, enwik8_small, enwik8_mini, pg19, pg19_small, pg19_mini,
        imagenet64, imagenet64_small, imagenet64_mini, sw_nope, sw_vq, sw_ovq, contest,
    )
}  # fmt: skip


def named(words: Iterable[str]) -> str | None:
    """The preset among words of a command line, the rest of which are key=value; None: none.

    Raises:
        ValueError: more than one.
    """
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ValueError(f"one preset at most, got {' and '.join(names)}")
    return names[0] if names else None


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
