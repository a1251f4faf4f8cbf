"""VQ-attention (Lingle, "Transformer-VQ", ICLR 2024): softmax over *quantized* keys, in O(T).

    o_t = sum_s softmax_s((q_t + u).k_hat_s + [t-s <= M] (q_t + w).r_(t-s)) v_s ,   k_hat = C[z]

Keys with the same code have the same score beyond the window, so all of them together are one
slot with score (q + u).C_c + log(count_c) and value mean_c: the attention over T keys becomes one
over M + L recent keys and S slots, and the result is the same number.

Blocks and gradients.  A call is cut in blocks of L tokens, each of which reads [M memory slots,
the block, S slots].  The output does not depend on L, since a pair may be served by either part.
The gradient to a *key* does: the straight-through estimator passes it on for pairs of the first
part, while the slots read the codebook, which is a constant.  So a key gets gradient from a query
exactly if it is not older than M tokens before the *start of the query's block* (for M = L, all of
the previous block), as in the official implementation.  Values get their gradient through both
parts.  ``reference.py`` states this densely, and the tests hold this file to it.  Blocks are
counted from the first token of a call.

Axes: B batch, H query head, G key-value head (R = H / G queries share one), T time, L block,
M window, S codes, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqlm.codebook import Codebook, CodeStats, Quantized, sum_by_code
from vqlm.config import LMConfig
from vqlm.layers import AttentionProjections, RelativeBias, relative_scores
from vqlm.segments import Segments, last_slots


class VQState(NamedTuple):
    """All that VQ-attention remembers of a stream, however long.  S is 0 without the cache."""

    code: Int[Tensor, "B G M"]
    """Codes of the last M keys, the newest last; arbitrary in slots not yet filled."""
    key: Float[Tensor, "B G M K"]
    """Those keys, quantized."""
    value: Float[Tensor, "B G M V"]
    """Their values."""
    value_sum: Float[Tensor, "B G S V"]
    """Sum of the values of older keys of the current document, by code."""
    value_count: Float[Tensor, "B G S"]
    """How many there are; the mean value of a code is their ratio."""
    length: Int[Tensor, " B"]
    """Tokens of the current document seen so far; those still in the window are its last ones."""


class VQAux(NamedTuple):
    """What the training loop needs of one VQ layer beside the output."""

    commitment: Float[Tensor, ""]
    """Sum over heads and tokens of |k - k_hat|^2; differentiable."""
    stats: CodeStats | None
    """Statistics for the codebook's update; None outside training unless asked for."""


def initial_state(config: LMConfig, batch_size: int, like: Tensor) -> VQState:
    """The empty state, with the dtype and device of ``like``."""
    groups, window = config.kv_heads, config.window
    n_code = config.n_code if config.cache else 0

    def zeros(*shape: int) -> Tensor:
        return like.new_zeros(batch_size, *shape)

    return VQState(
        zeros(groups, window).long(),
        zeros(groups, window, config.d_k),
        zeros(groups, window, config.d_v),
        zeros(groups, n_code, config.d_v),
        zeros(groups, n_code),
        zeros().long(),
    )


def vq_attention(
    query: Float[Tensor, "B H T K"],
    keys: Quantized,
    value: Float[Tensor, "B G T V"],
    codes: Float[Tensor, "G S K"],
    bias: RelativeBias,
    state: VQState,
    segments: Segments = Segments(),  # noqa: B008  (immutable)
    *,
    block: int,
    cache_grad: bool = True,
) -> tuple[Float[Tensor, "B H T V"], VQState]:
    """Attention over quantized keys, and the state after the call; ``state`` itself is kept.

    Whether there is a cache is decided by ``state`` (slots or none), the window M by its size.
    ``segments`` describes packed rows: real tokens first.  Outputs at padding are finite and
    meaningless.  ``cache_grad=False`` stops gradients at the start of every block.

    Raises:
        ValueError: ``bias`` was made for another window than ``state``.
    """
    batch, _, n_token, _ = query.shape
    window = state.key.shape[2]
    if bias.rows.shape[1] != window + 1:
        raise ValueError(
            f"vq_attention: the bias has rows for {bias.rows.shape[1]} distances, but a state with "
            f"a window of {window} wants {window + 1}; make both from one config"
        )
    recent, cache = _open(state)
    tokens = _Recent(
        keys.code,
        keys.key.to(state.key.dtype),
        value.to(state.value.dtype),
        segments.documents(batch, n_token, query.device),
    )
    outputs = []
    parts = zip(query.split(block, 2), tokens.split(block), strict=True)
    for index, (part, new) in enumerate(parts):
        joined = recent.join(new)
        outputs.append(_attend(part, joined, codes, bias, cache))
        n_real = None
        if segments.lengths is not None:
            n_real = (segments.lengths - index * block).clamp(0, part.shape[2])
        cache = _file(cache, joined, part.shape[2], n_real)
        recent = joined.newest(window, part.shape[2], n_real)
        if not cache_grad:
            recent, cache = recent.detach(), cache.detach()
    length = segments.advance(state.length, n_token)
    return torch.cat(outputs, 2), _close(recent, cache, length)


class _Recent(NamedTuple):
    """Tokens that are still seen one by one."""

    code: Int[Tensor, "B G W"]
    key: Float[Tensor, "B G W K"]
    value: Float[Tensor, "B G W V"]
    document: Int[Tensor, "B W"]
    """Document of the call each belongs to, 0 being the state's; -1: an empty or stale slot."""

    def split(self, n: int) -> list[_Recent]:
        """Pieces of ``n`` tokens each, the last one shorter."""
        parts = (x.split(n, dim) for x, dim in zip(self, (2, 2, 2, 1), strict=True))
        return [_Recent(*part) for part in zip(*parts, strict=True)]

    def join(self, new: _Recent) -> _Recent:
        """These and then ``new``."""
        return _Recent(
            *(torch.cat([a, b], dim) for a, b, dim in zip(self, new, (2, 2, 2, 1), strict=True))
        )

    def newest(self, n: int, n_new: int, n_real: Tensor | None) -> _Recent:
        """The last ``n``, when of the ``n_new`` joined last only ``n_real`` of a row are real."""
        pairs = zip(self, (2, 2, 2, 1), strict=True)
        return _Recent(*(last_slots(x, n, n_new, n_real, dim) for x, dim in pairs))

    def detach(self) -> _Recent:
        return self._replace(key=self.key.detach(), value=self.value.detach())


class _Cache(NamedTuple):
    """The slots: everything older, of one document."""

    value_sum: Float[Tensor, "B G S V"]
    value_count: Float[Tensor, "B G S"]
    document: Int[Tensor, " B"]

    def detach(self) -> _Cache:
        return self._replace(value_sum=self.value_sum.detach())


def _open(state: VQState) -> tuple[_Recent, _Cache]:
    age = torch.arange(state.key.shape[2], 0, -1, device=state.length.device)
    document = (age <= state.length[:, None]).long() - 1
    recent = _Recent(state.code, state.key, state.value, document)
    return recent, _Cache(state.value_sum, state.value_count, torch.zeros_like(state.length))


def _close(recent: _Recent, cache: _Cache, length: Int[Tensor, " B"]) -> VQState:
    # Slots of a document that has ended since they were filed are of no more use.
    same = (cache.document == recent.document[:, -1])[:, None, None]
    return VQState(
        recent.code, recent.key, recent.value,
        cache.value_sum * same[..., None], cache.value_count * same, length,
    )  # fmt: skip


def _attend(
    query: Float[Tensor, "B H L K"],
    recent: _Recent,
    codes: Float[Tensor, "G S K"],
    bias: RelativeBias,
    cache: _Cache,
) -> Float[Tensor, "B H L V"]:
    """One block of queries over its recent keys and the slots, in one softmax."""
    groups, n_recent, n_query = recent.key.shape[1], recent.key.shape[2], query.shape[2]
    windowed = cache.value_count.shape[-1] == 0
    content = rearrange(query + bias.content[:, None], "b (g r) l k -> b g r l k", g=groups)
    position = relative_scores(query + bias.position[:, None], bias.rows)
    scores = torch.einsum("bgrlk,bgwk->bgrlw", content, recent.key)
    scores = scores + rearrange(position, "b (g r) l w -> b g r l w", g=groups)
    own = recent.document[:, n_recent - n_query :]
    hidden = ~_visible(own, recent.document, windowed)
    # Adding -inf costs nothing in the backward pass, filling with it does.
    scores += torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, -torch.inf)[
        :, None, None
    ]
    if windowed:
        out = torch.einsum("bgrlw,bgwv->bgrlv", scores.softmax(-1), recent.value)
        return out.flatten(1, 2)

    slots = torch.einsum("bgrlk,gsk->bgrls", content, codes)
    stranger = (own != cache.document[:, None])[:, None, None, :, None]
    log_count = cache.value_count.log()[:, :, None, None]
    slots = slots + log_count.masked_fill(stranger, -torch.inf)
    weights = torch.cat([scores, slots], -1).softmax(-1)
    of_recent, of_slots = weights.split([n_recent, slots.shape[-1]], -1)
    mean = cache.value_sum / cache.value_count.clamp(min=1)[..., None]
    out = torch.einsum("bgrlw,bgwv->bgrlv", of_recent, recent.value)
    out = out + torch.einsum("bgrls,bgsv->bgrlv", of_slots, mean)
    return out.flatten(1, 2)


def _visible(own: Tensor, recent: Tensor, windowed: bool) -> Bool[Tensor, "B L W"]:
    """Which of the W recent keys each of the L queries may see; the queries are the last keys."""
    n_query, n_recent = own.shape[1], recent.shape[1]
    window = n_recent - n_query
    column = torch.arange(n_recent, device=own.device)
    row = torch.arange(n_query, device=own.device)[:, None]
    allowed = column <= row + window
    if windowed:
        allowed = allowed & (column >= row)
    return allowed & (own[:, :, None] == recent[:, None, :])


def _file(cache: _Cache, joined: _Recent, n_new: int, n_real: Tensor | None) -> _Cache:
    """Files the keys that leave the window as ``n_new`` tokens come in, ``n_real`` of them real.

    The slots hold one document only, that of the newest key that has left.
    """
    n_code = cache.value_count.shape[-1]
    if n_code == 0:
        return cache
    code, _, value, document = joined.split(n_new)[0]
    if n_real is None:
        newest, leaves = document[:, -1], torch.ones_like(document, dtype=torch.bool)
    else:
        newest = document.gather(1, (n_real - 1).clamp(min=0)[:, None])[:, 0]
        newest = torch.where(n_real > 0, newest, cache.document)
        leaves = torch.arange(n_new, device=code.device) < n_real[:, None]
    kept = (document == newest[:, None]) & (newest >= 0)[:, None] & leaves
    weight = kept[:, None, :].to(value.dtype).expand_as(code)
    same = (cache.document == newest)[:, None, None]
    count = (cache.value_count * same).scatter_add(2, code, weight)
    total = cache.value_sum * same[..., None]
    total = total + sum_by_code(value * weight[..., None], code, n_code)
    return _Cache(total, count, torch.where(newest >= 0, newest, cache.document))


class VQAttention(nn.Module):
    """VQ-attention with its projections and codebook: ``y, state, aux = mixer(x, state)``.

    Head types by config: one gated head (the paper's), multi-query, multi-head, grouped.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.project = AttentionProjections(config)
        self.codebook = Codebook(config.kv_heads, config.n_code, config.d_k)

    def init_state(self, batch_size: int) -> VQState:
        """The empty state of ``batch_size`` rows."""
        return initial_state(self.config, batch_size, self.project.content_bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: VQState | None = None,
        segments: Segments = Segments(),  # noqa: B008  (immutable)
        with_stats: bool | None = None,
        seed: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], VQState, VQAux]:
        """Any number of tokens, after those that ``state`` has seen; T = 1 decodes.

        ``segments`` describes packed rows (``Segments.of(mask, starts).pack(x)``).
        ``with_stats``: gather codebook statistics; None: in training mode only.
        ``seed``: of the sinusoids' dropout; None: torch's generator.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        with_stats = self.training if with_stats is None else with_stats
        query, key, value, gate = self.project(x)
        codes = self.codebook.codes()
        keys = self.codebook(key, codes, segments.learnable(x.shape[1], x.device), with_stats)
        heads, state = vq_attention(
            query, keys, value, codes, self.project.bias(seed), state, segments,
            block=self.config.block, cache_grad=self.config.cache_grad,
        )  # fmt: skip
        return self.project.merge(heads, gate), state, VQAux(keys.commitment, keys.stats)
