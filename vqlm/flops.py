"""Floating-point operations of a model, counted from its config; an addition and a product are two.

Counted are the products of matrices, as torch's ``FlopCounterMode`` does, of one row from the empty
state.  Attention is counted as it is computed, block by block: with the masked half of the block
that a query is in, without keys before the first.  Not counted: elementwise work, sums by code.
"vq" is counted as if every code were in use as soon as one is; slots that no key has been filed
under yet are left out, which at short lengths is less work.  Of "gated-deltanet" the solving of a
triangle in each chunk is left out, as torch does.

A training step is three forward passes (``TRAINING``), as everywhere: the backward pass has two
products for each one of the forward pass.  What a backward pass computes again is not counted, so a
share of the machine's limit tells how much of it does useful work.

Axes: T time, D model width, H query heads, G key-value heads, K key width, V value width, L block
or chunk, M window, S codes, N entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_flop_count

from vqlm.config import LMConfig
from vqlm.dictionary import dictionary_size
from vqlm.layers import projection_widths

RECURRENT: dict[str, Callable[[LMConfig], tuple[int, int, int]]] = {
    "gated-deltanet": LMConfig.deltanet_shape,
    "mamba2": LMConfig.mamba_shape,
}
CONV_WIDTH, CHUNK = 4, 64
"""Tokens that the short convolutions of transformers' mixers span; that they take at a time."""

TRAINING = 3
"""Forward passes that a training step counts as."""


def model_flops(config: LMConfig, seq_len: int) -> int:
    """Of a forward pass of the whole model over ``seq_len`` tokens."""
    layers = sum(layer_flops(config, config.mixer_of(i), seq_len) for i in range(config.n_layer))
    if shifted := sum(map(config.shifts_keys, range(config.n_layer))):
        # The token before the call goes through their projection once more.
        layers += shifted * 2 * config.d_model * sum(projection_widths(config))
    return layers + 2 * seq_len * config.d_model * config.vocab_size


def layer_flops(config: LMConfig, mixer: str, seq_len: int) -> int:
    """Of one layer: projections, attention, and the SwiGLU if it has one."""
    heads, k, v = config.n_head, config.d_k, config.d_v
    projected = heads * k + sum(projection_widths(config)) + heads * v
    if mixer in RECURRENT:
        projected = _recurrent_projections(config, mixer)
    total = 2 * seq_len * config.d_model * projected + attention_flops(config, mixer, seq_len)
    if mixer in ("vq", "softmax", "window") and config.positions == "relative":
        total += 2 * (config.window + 1) * config.d_model * heads * k
    if config.layer == "swiglu":
        total += 2 * seq_len * config.d_model * 3 * config.ff_width
    return total


def attention_flops(config: LMConfig, mixer: str, seq_len: int) -> int:
    """Of attention alone: with quantization or the growth of a dictionary, without projections.

    ``mixer``: one of ``config.MIXERS``, or "sdpa", causal attention without a bias, of which
    exactly the visible pairs are counted.
    """
    if mixer == "sdpa":
        pairs = seq_len * (seq_len + 1) // 2
        return 2 * config.n_head * pairs * (config.d_k + config.d_v)
    return _BY_BLOCKS[mixer](config, seq_len)


def _vq(config: LMConfig, seq_len: int) -> int:
    heads, k, v, window = config.n_head, config.d_k, config.d_v, config.window
    quantization = 2 * config.kv_heads * seq_len * config.n_code * k
    total = 0
    for begin in range(0, seq_len, config.block):
        end = min(begin + config.block, seq_len)
        total += (end - begin) * (end - max(0, begin - window)) * (k + v)
        total += (end - begin) * (window + 1) * k
        if config.cache and begin > window:
            total += (end - begin) * config.n_code * (k + v)
    return quantization + 2 * heads * total


def _softmax(config: LMConfig, seq_len: int, window: int | None = None) -> int:
    total = 0
    for begin in range(0, seq_len, config.block):
        end = min(begin + config.block, seq_len)
        first = 0 if window is None else max(0, begin - window)
        total += (end - begin) * (end - first) * (config.d_k + config.d_v)
        total += (end - begin) * (config.window + 1) * config.d_k
    return 2 * config.n_head * total


def _window(config: LMConfig, seq_len: int) -> int:
    # The window's slots are there, empty, before the first token.
    first = sum(
        (end - begin) * (config.window - begin)
        for begin in range(0, min(config.window, seq_len), config.block)
        for end in [min(begin + config.block, seq_len)]
    )
    missing = 2 * config.n_head * first * (config.d_k + config.d_v)
    return _softmax(config, seq_len, config.window) + missing


def _ovq(config: LMConfig, seq_len: int) -> int:
    reads = files = used = 0
    for begin in range(0, seq_len, config.chunk):
        n_query = min(config.chunk, seq_len - begin)
        reads += n_query * (n_query + used) * (config.d_k + config.d_v)
        if n_query == config.chunk:
            seen = torch.tensor([begin + n_query])
            grown = dictionary_size(seen, config.n_entry, config.growth, config.growth_span)
            if config.filing == "merge":  # all with all, and two more columns for the squares
                files += (used + n_query) ** 2 * (config.d_k + 2)
            else:
                files += n_query * (used + n_query) * config.d_k
            used = int(grown)
    return 2 * config.n_head * reads + 2 * config.kv_heads * files


def _recurrent_projections(config: LMConfig, mixer: str) -> int:
    heads, one, other = RECURRENT[mixer](config)
    if mixer == "mamba2":
        value, key = heads * one, other  # one key and one query for all heads
        return (2 * value + 2 * key + heads) + value
    key, value = heads * one, heads * other
    return (2 * key + 2 * value + 2 * heads) + value


def _convolution(n_channel: int, seq_len: int) -> int:
    return 2 * n_channel * CONV_WIDTH * (seq_len + 2 * (CONV_WIDTH - 1))


def _gated_deltanet(config: LMConfig, seq_len: int) -> int:
    heads, k, v = RECURRENT["gated-deltanet"](config)
    n_chunk = -(-seq_len // CHUNK)
    chunk = CHUNK * CHUNK * (2 * k + v) + 3 * CHUNK * k * v
    return 2 * heads * n_chunk * chunk + _convolution(heads * (2 * k + v), seq_len)


def _mamba2(config: LMConfig, seq_len: int) -> int:
    heads, v, k = RECURRENT["mamba2"](config)
    n_chunk = -(-seq_len // CHUNK)
    chunks = n_chunk * (CHUNK * CHUNK * (k + v) + 2 * CHUNK * k * v)
    chunks += (n_chunk + 1) ** 2 * k * v
    return 2 * heads * chunks + _convolution(heads * v + 2 * k, seq_len)


_BY_BLOCKS: dict[str, Callable[[LMConfig, int], int]] = {
    "vq": _vq,
    "softmax": _softmax,
    "window": _window,
    "ovq": _ovq,
    "gated-deltanet": _gated_deltanet,
    "mamba2": _mamba2,
}


def counted_flops(function: Callable[[], object]) -> int:
    """Of what ``function`` does, as torch sees it: for models whose formula nobody has written.

    torch's counter knows neither the CPU's flash attention nor products that add in place; it is
    told here.  Causal attention counts half, as its kernel skips the other half.
    """
    aten = torch.ops.aten
    told: dict[Any, Any] = {
        aten.baddbmm_: _baddbmm,
        aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    }
    with FlopCounterMode(display=False, custom_mapping=told) as counter:
        function()
    return counter.get_total_flops()


def _baddbmm(_: Any, a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return bmm_flop(a_shape, b_shape)


def _flash(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> int:
    total = sdpa_flop_count(query, key, value)
    return total * (query[2] + 1) // (2 * query[2]) if is_causal else total
