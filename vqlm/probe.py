"""Looks into a trained model while it reads: where attention goes, what memory holds, what errs.

Attention is linear in the values, so a mixer that is given the values e_0 ... e_(T-1), one-hot
vectors of length T, returns its own matrix of attention weights.  Nothing is computed a second way:
the weights are those of the mixer that the model runs.

Axes: B batch, H query head, T time (the reader's token), S time (the token that is attended to).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqlm import ovq, softmax, vq
from vqlm.data import Split
from vqlm.flops import RECURRENT
from vqlm.fused import at_least_float32
from vqlm.kept import evaluating
from vqlm.layers import Before
from vqlm.model import LM, Layer, LMState
from vqlm.vocabulary import END

FIRST_BIN = 16
"""Positions in the first bin of ``loss_by_position``; every later bin ends at twice the one before
it."""


class Mass(NamedTuple):
    """Where the attention of one layer goes."""

    mixer: str
    """The layer's kind of mixer, a name of ``LMConfig.mixers``."""
    near: Float[Tensor, " H"]
    """Share of the weight of each head on what is kept token by token; the rest is on what is
    older: cache, dictionary, or (softmax) all earlier tokens."""


class PositionLoss(NamedTuple):
    """Loss by the number of tokens that were read before, in bins of positions."""

    first: Int[np.ndarray, " n"]
    """First position of each bin; the last bin ends at ``length``."""
    length: int
    """Tokens of a piece of text."""
    bits: Float[np.ndarray, " n"]
    """Mean bits per token of each bin."""
    error: Float[np.ndarray, " n"]
    """Standard error of that mean, from the spread over pieces; not-a-number for one piece."""


class Growth(NamedTuple):
    """How the memory of one layer fills up as a text is read."""

    mixer: str
    """"vq" or "ovq"."""
    n_token: Int[np.ndarray, " n"]
    """Tokens read."""
    share: Float[np.ndarray, " n"]
    """Share of the cache's slots, or the dictionary's entries, in use; mean over heads."""


@torch.no_grad()
def attention_weights(
    mixer: nn.Module, x: Float[Tensor, "1 T D"], before: Before | None = None
) -> Float[Tensor, "H T S"]:
    """The weights with which each of T tokens reads itself and the tokens before it.

    ``x``, and ``before`` if keys are shifted, are what the mixer of a layer receives.
    Memory grows with H T^2.

    Raises:
        TypeError: a mixer of a kind that is not known here.
    """
    n_token = x.shape[1]
    if isinstance(mixer, ovq.OVQAttention):
        return _ovq_weights(mixer, x, before)
    if not isinstance(mixer, vq.VQAttention | softmax.SoftmaxAttention):
        raise TypeError(f"attention_weights: {type(mixer).__name__} is no mixer of vqlm.model")
    query, key, _, _ = mixer.project(x, before=before)
    if isinstance(mixer, softmax.SoftmaxAttention):
        query, key = mixer.placed(query, key, torch.arange(n_token, device=x.device)[None])
    config = dataclasses.replace(mixer.config, d_v=n_token)
    value = repeat(torch.eye(n_token).to(key), "t v -> 1 g t v", g=config.kv_heads)
    bias = mixer.project.bias()
    if isinstance(mixer, vq.VQAttention):
        codes = mixer.codebook.codes()
        valid = torch.ones(1, n_token, dtype=torch.bool, device=x.device)
        keys = mixer.codebook(key, codes, valid, with_stats=False)
        empty = vq.initial_state(config, 1, value)
        return vq.vq_attention(
            query, keys, value, codes, bias, empty, block=config.block
        )[0][0]  # fmt: skip
    blank = softmax.SoftmaxState(key[:, :, :0], value[:, :, :0], x.new_zeros(1).long())
    return softmax.softmax_attention(
        query, key, value, bias, blank, block=config.block, window_only=mixer.window_only
    )[0][0]


def _ovq_weights(mixer: ovq.OVQAttention, x: Tensor, before: Before | None) -> Tensor:
    n_token = x.shape[1]
    config = dataclasses.replace(mixer.config, d_v=n_token)
    projected = mixer.project(x, before)
    value = repeat(torch.eye(n_token).to(x), "t v -> 1 g t v", g=config.kv_heads)
    empty = ovq.initial_state(config, 1, value)
    return mixer.read(projected._replace(value=value), empty)[0][0]


@torch.no_grad()
def attention_mass(model: LM, tokens: Int[Tensor, "1 T"]) -> list[Mass]:
    """Share of each layer's and head's attention on near tokens, the mean over late queries.

    Near are tokens at a distance of at most ``window`` (the M tokens before a query, and itself);
    with "ovq", the tokens of the chunk that is open.  Only queries with at least ``window`` +
    1 tokens before them (a whole chunk, with "ovq") count: all others have nothing else to see.

    Raises:
        ValueError: a text that is too short for any such query, or a mixer without such weights.
    """
    config, n_token = model.config, tokens.shape[1]
    if without := set(config.mixers) & set(RECURRENT):
        raise ValueError(f"attention_mass: a {min(without)} mixer has no weights of single tokens")
    reach = max(config.window + 1, config.chunk if "ovq" in config.mixers else 0)
    if n_token <= reach:
        raise ValueError(f"attention_mass: {n_token} tokens; wanted more than {reach}")
    time = torch.arange(n_token, device=tokens.device)
    by_distance = time[:, None] - time <= config.window
    in_chunk = time[:, None] // config.chunk == time // config.chunk
    found = []
    for layer, (x, before) in enumerate(_inputs_of_mixers(model, tokens)):
        mixer = config.mixer_of(layer)
        weights = attention_weights(_mixers(model)[layer], x, before)
        near = (weights * (in_chunk if mixer == "ovq" else by_distance)).sum(-1)
        found.append(Mass(mixer, near[:, reach:].mean(-1).cpu()))
    return found


def _mixers(model: LM) -> list[nn.Module]:
    return [layer.mixer for layer in model.layers if isinstance(layer, Layer)]


def _inputs_of_mixers(model: LM, tokens: Tensor) -> list[tuple[Tensor, Before | None]]:
    """What each layer's mixer receives when the model reads ``tokens``: [1, T, D], and what it
    needs for shifted keys."""
    inputs: list[tuple[Tensor, Before | None]] = []

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append((given[0], next((x for x in given if isinstance(x, Before)), None)))

    hooks = [mixer.register_forward_pre_hook(note) for mixer in _mixers(model)]
    try:
        with evaluating(model):  # dropout would show another model
            model(tokens, with_stats=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def pieces(split: Split, length: int, count: int) -> Int[np.ndarray, "n length"] | None:
    """Up to ``count`` pieces of ``length`` tokens, none across a document's end, spread evenly.

    None if no document is that long.
    """
    offsets = split.document_offsets
    starts = [
        np.arange(begin, end - length + 1, length)
        for begin, end in zip(offsets, [*offsets[1:], len(split.tokens)], strict=True)
    ]
    all_starts = np.concatenate(starts)
    if len(all_starts) == 0:
        return None
    chosen = np.unique(np.linspace(0, len(all_starts) - 1, count).astype(int))
    return np.stack([split.tokens[s : s + length] for s in all_starts[chosen]]).astype(np.int64)


@torch.no_grad()
def loss_by_position(
    model: LM, text: Int[np.ndarray, "n length"], seq_len: int = 256
) -> PositionLoss:
    """Bits per token against the tokens read before, each row a text of its own from its start.

    ``seq_len`` tokens are read in one call, the state is carried: it only costs memory.
    """
    bits, _ = bits_by_token(model, text, seq_len)
    n_piece, length = bits.shape
    first = first_of_bins(length)
    by_piece = np.stack([b.mean(1) for b in np.split(bits, first[1:], axis=1)])
    spread = by_piece.std(1, ddof=1) if n_piece > 1 else np.full(len(first), np.nan)
    return PositionLoss(np.array(first), length, by_piece.mean(1), spread / math.sqrt(n_piece))


def first_of_bins(length: int) -> list[int]:
    """First position of each bin of ``loss_by_position``, for pieces of ``length`` tokens."""
    first = [0]
    while (end := max(FIRST_BIN, 2 * first[-1])) < length:
        first.append(end)
    return first


@torch.no_grad()
def bits_by_token(
    model: LM, text: Int[np.ndarray, "n length"], seq_len: int = 256
) -> tuple[Float[np.ndarray, "n length"], LMState]:
    """Bits that each token costs, as in ``loss_by_position``, and the state behind the last."""
    device = next(model.parameters()).device
    targets = torch.from_numpy(text).to(device)
    inputs = torch.cat([torch.full_like(targets[:, :1], END), targets[:, :-1]], 1)
    state, nats = None, []
    with evaluating(model):
        for part, wanted in zip(inputs.split(seq_len, 1), targets.split(seq_len, 1), strict=True):
            out = model(part, state, with_stats=False)
            state = out.state
            logits = at_least_float32(out.logits)
            each = F.cross_entropy(logits.mT, wanted, reduction="none")
            nats.append(each.cpu())
    assert state is not None
    return torch.cat(nats, 1).double().numpy() / math.log(2), state


@torch.no_grad()
def memory_growth(model: LM, tokens: Int[Tensor, "1 T"], seq_len: int = 64) -> list[Growth | None]:
    """Share of each layer's cache slots or dictionary entries in use, every ``seq_len`` tokens.

    One entry a layer; None for mixers that have neither.
    """
    state, shares = None, []
    n_token: list[int] = []
    with evaluating(model):
        for part in tokens.split(seq_len, 1):
            state = model(part, state, with_stats=False).state
            shares.append([_share_in_use(layer) for layer in state.layers])
            n_token.append((n_token[-1] if n_token else 0) + part.shape[1])
    grown: list[Growth | None] = []
    for layer in range(model.config.n_layer):
        mixer, own = model.config.mixer_of(layer), [row[layer] for row in shares]
        has_one = own[0] is not None
        grown.append(Growth(mixer, np.array(n_token), np.array(own)) if has_one else None)
    return grown


def _share_in_use(state: object) -> float | None:
    if isinstance(state, vq.VQState) and state.value_count.shape[-1] > 0:
        return (state.value_count > 0).float().mean().item()
    if isinstance(state, ovq.OVQState):
        return (state.key_count > 0).float().mean().item()
    return None
