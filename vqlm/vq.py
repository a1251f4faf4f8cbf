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
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqlm.codebook import Codebook, CodeStats, Quantized, sum_by_code
from vqlm.config import LMConfig
from vqlm.fused import normalised
from vqlm.layers import AttentionProjections, Before, RelativeBias
from vqlm.segments import Segments, last_slots
from vqlm.sequence_parallel import Cut
from vqlm.vq_call import Tensors
from vqlm.vq_kernel import attend
from vqlm.vq_schedule import Schedule
from vqlm.vq_step import Step, attend_once, file_once


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
    """The empty state, with the dtype and device of ``like`` [any shape]."""
    groups, window = config.kv_heads, config.window
    n_code = config.n_code if config.cache else 0

    def zeros(*shape: int) -> Tensor:
        # One zero seen everywhere: nothing writes into a state, so it needs no memory.
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(batch_size, *shape)

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
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T V"], VQState]:
    """Attention over quantized keys, and the state after the call; ``state`` itself is kept.

    Whether there is a cache is decided by ``state`` (slots or none), the window M by its size.
    ``segments`` describes packed rows: real tokens first.  Outputs at padding are finite and
    meaningless.  ``cache_grad=False`` stops gradients at the start of every block.  ``scale``:
    queries are normalised first (``fused.normalise``), which so costs no memory.

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
    if n_token == 1 and segments.plain and not torch.is_grad_enabled():
        query = query if scale is None else normalised(query, scale)
        return _one_token(query, keys, value, codes, bias, state)
    dtype = state.key.dtype
    code = torch.cat([state.code, keys.code], 2)
    schedule = Schedule.of(
        code, state.length, segments, window=window, block=block, count=state.value_count
    )
    key = keys.key.to(dtype)
    # Values in bfloat16 stay so, as do queries that the kernel normalises: it makes its products
    # in the dtype of the values, and keeps its sums and what it hands on in that of the state.
    if value.dtype != torch.bfloat16:
        value = value.to(dtype)
    query = query.to(dtype) if scale is None else query
    content, position, rows = (b.to(dtype) for b in bias)
    x = Tensors(
        query, key, value, content, position, rows, state.key, state.value, state.value_sum,
        state.value_count, codes.to(dtype),
    )  # fmt: skip
    out, sums = attend(x, schedule, cache_grad, scale)

    after = VQState(
        _newest(state.code, keys.code, segments.lengths),
        _newest(state.key, key, segments.lengths),
        _newest(state.value, value, segments.lengths),
        *_slots_after(sums, schedule, segments), segments.advance(state.length, n_token),
    )  # fmt: skip
    if not cache_grad:
        after = VQState(*(field.detach() for field in after))
    return out, after


def _slots_after(
    slots: Float[Tensor, "B G S VN"], schedule: Schedule, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Sums and counts after the call; those of a document that has ended are of no more use."""
    sums, counts = slots[..., :-1], slots[..., -1]
    if segments.starts is None:
        return sums, counts
    batch, n_token = segments.starts.shape
    newest = segments.newest_document(batch, n_token, slots.device)
    same = (schedule.slots_document[:, -1] == newest)[:, None, None]
    return sums * same[..., None], counts * same


def _newest(old: Tensor, new: Tensor, lengths: Tensor | None) -> Tensor:
    """What of ``old`` [B, G, M, .] and ``new`` [B, G, T, .] is in the window after the call."""
    window, n_token = old.shape[2], new.shape[2]
    if lengths is None and n_token >= window:
        # A view would keep all of the call's tokens as long as the state lives.
        return last_slots(new, window, n_token, None, 2).to(old.dtype)
    return last_slots(torch.cat([old, new], 2), window, n_token, lengths, 2)


def _one_token(
    query: Tensor, keys: Quantized, value: Tensor, codes: Tensor, bias: RelativeBias, state: VQState
) -> tuple[Tensor, VQState]:
    """``vq_attention`` of one token, where neither gradient nor segments are asked for."""
    dtype = state.key.dtype
    code = torch.cat([state.code, keys.code], 2)
    key = torch.cat([state.key, keys.key.to(dtype)], 2)
    value = torch.cat([state.value, value.to(dtype)], 2)
    content, position, rows = (b.to(dtype) for b in bias)
    x = Step(
        query.to(dtype), code, key, value, content, position, rows, codes.to(dtype),
        state.value_sum, state.value_count, state.length,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        out, (sums, counts) = attend_once(x), file_once(x)
    code, key, value = (joined[:, :, 1:].contiguous() for joined in (code, key, value))
    return out, VQState(code, key, value, sums, counts, state.length + 1)


def _state_before(
    cut: Cut,
    state: VQState,
    keys: Quantized,
    value: Float[Tensor, "B G T V"],
    segments: Segments,
    cache_grad: bool,
) -> VQState:
    """The state at the beginning of this part of a sequence that is cut over processes.

    ``state`` is of before the first part, but has the length of here.
    """
    dtype, n_token = state.key.dtype, value.shape[2]
    window, n_code = state.key.shape[2], state.value_count.shape[2]

    def joined(code: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([code[..., None].to(dtype), key.to(dtype), value.to(dtype)], -1)

    newest = cut.newest_before(
        joined(keys.code, keys.key, value), joined(state.code, state.key, state.value), 2
    )
    key, before = newest.split([1 + state.key.shape[3], value.shape[3]], -1)
    code, key = key[..., 0].long(), key[..., 1:]
    sums = torch.cat([state.value_sum, state.value_count[..., None]], -1)
    if n_code:
        # What leaves the window in this part and is of the document that its last token is of.
        leaving = torch.cat([before, value.to(dtype)], 2)[:, :, :n_token]
        document = segments.joined_documents(state.length, window, n_token)[:, :n_token]
        last = segments.newest_document(len(value), n_token, value.device)
        weight = (document == last[:, None])[:, None, :, None].to(dtype)
        codes = torch.cat([code, keys.code], 2)[:, :, :n_token]
        filed = sum_by_code(F.pad(leaving, (0, 1), value=1.0) * weight, codes, n_code)
        goes_on = last == 0
        if cut.is_first:
            found = cut.sums_before(filed + sums * goes_on.view(-1, 1, 1, 1), goes_on)
            sums = found + sums
        else:
            sums = cut.sums_before(filed, goes_on)
    here = VQState(code, key, before, sums[..., :-1], sums[..., -1], state.length)
    return here if cache_grad else VQState(*(field.detach() for field in here))


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
        before: Before | None = None,
    ) -> tuple[Float[Tensor, "B T D"], VQState, VQAux]:
        """Any number of tokens, after those that ``state`` has seen; T = 1 decodes.

        ``segments`` describes packed rows (``Segments.of(mask, starts).pack(x)``).
        ``with_stats``: gather codebook statistics; None: in training mode only.
        ``seed``: of the sinusoids' dropout; None: torch's generator.
        ``before``: keys are those of the token before.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        with_stats = self.training if with_stats is None else with_stats
        query, key, value, gate = self.project(x, True, before)
        codes, scale = self.codebook.codes(), self.project.scale
        learnable = segments.learnable(x.shape[1], x.device)
        keys = self.codebook(key, codes, learnable, with_stats, scale)
        if segments.cut is not None:
            state = _state_before(
                segments.cut, state, keys, value, segments, self.config.cache_grad
            )
        if self.project.learned_temperature:  # which the kernel doesn't know
            query, scale = self.project.ready(query), None
        heads, state = vq_attention(
            query, keys, value, codes, self.project.bias(seed), state, segments,
            block=self.config.block, cache_grad=self.config.cache_grad, scale=scale,
        )  # fmt: skip
        return (
            self.project.merge(heads.to(x.dtype), gate),
            state,
            VQAux(keys.commitment, keys.stats),
        )
