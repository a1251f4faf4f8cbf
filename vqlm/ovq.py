"""OVQ-attention (Alonso, Figliolia, Millidge 2026): dictionaries learned in the forward pass.

A mixture of N entries, each a mean key and a mean value with a count, stands for everything older
than the chunk that is open.  Keys and queries have length 1.  Query i reads, with inverse
temperature beta of its head,

    D_s = exp(beta q_i.mu_s)   entry s, mu_s = S_k[s] / |S_k[s]|   (or the mean, S_k[s] / c_s)
    E_j = exp(beta q_i.k_j)    token j <= i of the open chunk

    o_i = (sum_s D_s S_v[s] + sum_j E_j v_j) / (sum_s D_s c_s + sum_j E_j) ,

the conditional mean of a Gaussian mixture whose weights are the counts.  S_k, S_v are sums of keys
and values, c counts; c times the mean is the sum, so no logarithm is needed.

Whenever a chunk of L tokens is full it is *merged*: the dictionary grows to the size that its
schedule has for this many tokens, the chunk's least familiar keys (least similar to every entry
and to the chunk's earlier keys) become entries, every other token joins the most similar one.
Only what a token is assigned to changes.  Assignments carry no gradient, the sums do.

Chunks begin at multiples of L from the start of each document, whatever the calls: L is part of the
mathematics here, other than the block of VQ-attention.  Rows need not be in step: a call is laid
out as a grid of chunks, each row's at its own place.

Axes: B batch, H query head, G key-value head (R = H / G queries share one), T time, L chunk,
N entries, K key width, V value width, C chunks of a call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqlm.chunks import lay_out
from vqlm.config import LMConfig
from vqlm.dictionary import Rules
from vqlm.layers import (
    CACHE_SCORE,
    MOST_SCORE,
    Before,
    Projected,
    begin_alike_,
    gated_output,
    project,
    projection_widths,
)
from vqlm.ovq_kernel import Call, ovq_function
from vqlm.segments import Segments

BETA_START = 8.0
"""Inverse temperature at first, or ``CACHE_SCORE`` with ``shifted_keys``; the most it may become is
``MOST_SCORE``."""


class OVQState(NamedTuple):
    """All that OVQ-attention remembers of a stream, however long."""

    key_sum: Float[Tensor, "B G N K"]
    """Sum of the keys of each entry; zeros in entries not yet used."""
    value_sum: Float[Tensor, "B G N V"]
    """Sum of their values."""
    key_count: Float[Tensor, "B G N"]
    """How many there are; exact up to 2^24 in float32."""
    key: Float[Tensor, "B G L K"]
    """Keys of the open chunk, its first ``length`` modulo L; zeros behind them."""
    value: Float[Tensor, "B G L V"]
    """Their values."""
    n_used: Int[Tensor, " B"]
    """Entries in use, the first ones."""
    length: Int[Tensor, " B"]
    """Tokens of the current document seen so far."""


def initial_state(config: LMConfig, batch_size: int, like: Tensor) -> OVQState:
    """The empty state, on the device of ``like`` [any shape], in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    groups, n, chunk = config.kv_heads, config.n_entry, config.chunk

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch_size, groups, *shape, dtype=dtype, device=like.device)

    none = torch.zeros(batch_size, dtype=torch.long, device=like.device)
    return OVQState(
        zeros(n, config.d_k), zeros(n, config.d_v), zeros(n), zeros(chunk, config.d_k),
        zeros(chunk, config.d_v), none, none.clone(),
    )  # fmt: skip


def ovq_attention(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G T K"],
    value: Float[Tensor, "B G T V"],
    beta: Float[Tensor, " H"],
    state: OVQState,
    segments: Segments = Segments(),  # noqa: B008  (immutable)
    rules: Rules = Rules(),  # noqa: B008  (immutable)
) -> tuple[Float[Tensor, "B H T V"], OVQState]:
    """Attention over a dictionary learned on the way, and the state after the call.

    Queries and keys are of length 1, beta positive and at most ``MOST_SCORE``; it is not checked.
    All is computed in the dtype of ``state``, which itself is kept; N and L are those of it.
    ``segments`` describes packed rows: real tokens first.  Outputs at padding are zeros.

    Raises:
        ValueError: rules that don't exist.
    """
    rules.check()
    dtype, (n_entry, chunk) = state.key_sum.dtype, (state.key_count.shape[2], state.key.shape[2])
    query, key, value, beta = (x.to(dtype) for x in (query, key, value, beta))
    layout = lay_out(
        segments, state.length, state.n_used, query.shape[2], chunk,
        lambda n_token: rules.size(n_token, n_entry),
    )  # fmt: skip
    if not layout.chunks or not query.shape[2]:  # nothing but padding, or nothing
        return value.new_zeros(*query.shape[:3], value.shape[3]), state
    keys, values = layout.keys(key, state.key), layout.keys(value, state.value)
    with torch.autocast(query.device.type, enabled=False):  # scores and assignments stay as exact
        out, key_sum, value_sum, count = ovq_function(
            layout.queries(query), keys, values, beta, state.key_sum, state.value_sum,
            state.key_count, Call(layout.chunks, rules, key.shape[1]),
        )  # fmt: skip
    return layout.outputs(out), OVQState(
        key_sum, value_sum, count, layout.tail(keys, state.key),
        layout.tail(values, state.value), layout.n_used,
        segments.advance(state.length, query.shape[2]),
    )  # fmt: skip


class OVQAttention(nn.Module):
    """OVQ-attention with its projections: ``y, state, aux = mixer(x, state)``; aux is None.

    No position is encoded.  Gates as in ``AttentionProjections``.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.rules = Rules.of(config)
        heads, k, v = config.n_head, config.d_k, config.d_v
        self.query = nn.Linear(config.d_model, heads * k, bias=False)
        n_row = sum(projection_widths(config))
        self.key_value_gate = nn.Linear(config.d_model, n_row, bias=False)
        self.output = nn.Linear(heads * v, config.d_model, bias=False)
        self.log_beta = nn.Parameter(torch.full((heads,), math.log(BETA_START)))

    def project(self, x: Float[Tensor, "B T D"], before: Before | None = None) -> Projected:
        """Queries and keys of any length, values, and the gate if there is one."""
        return project(x, self.query, self.key_value_gate, self.config, before)

    def begin_as_cache_(self) -> None:
        """Keys begin as queries, see ``begin_alike_``; scores at ``CACHE_SCORE``."""
        begin_alike_(self.query, self.key_value_gate, self.config.kv_heads, self.config.d_k)
        nn.init.constant_(self.log_beta, math.log(CACHE_SCORE))

    def beta(self, dtype: torch.dtype) -> Float[Tensor, " H"]:
        """Inverse temperature of each head."""
        return self.log_beta.to(dtype).exp().clamp(max=MOST_SCORE)

    def init_state(self, batch_size: int) -> OVQState:
        """The empty state of ``batch_size`` rows, with the N of the config."""
        return initial_state(self.config, batch_size, self.log_beta)

    def read(
        self, projected: Projected, state: OVQState, segments: Segments = Segments(),  # noqa: B008
    ) -> tuple[Float[Tensor, "B H T V"], OVQState]:  # fmt: skip
        """``ovq_attention`` of what ``project`` gives, its keys and queries scaled to length 1."""
        dtype = state.key_sum.dtype
        with torch.autocast(projected.key.device.type, enabled=False):
            query, key = (F.normalize(x.to(dtype), dim=-1) for x in projected[:2])
            beta = self.beta(dtype)
        return ovq_attention(query, key, projected.value, beta, state, segments, self.rules)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: OVQState | None = None,
        segments: Segments = Segments(),  # noqa: B008  (immutable)
        with_stats: bool | None = None,
        seed: int | None = None,
        before: Before | None = None,
    ) -> tuple[Float[Tensor, "B T D"], OVQState, None]:
        """Any number of tokens, after those that ``state`` has seen; T = 1 decodes.

        ``with_stats`` and ``seed`` are for other mixers: there is no codebook and no sinusoid.
        ``before``: keys are those of the token before.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        projected, cut = self.project(x, before), segments.cut
        if cut is not None:
            state = OVQState(*cut.take(state, projected.value))
        heads, state = self.read(projected, state, segments)
        if cut is not None:
            heads = cut.hand_on(heads, state)
        y = gated_output(self.output, heads.to(x.dtype), projected.gate, self.config.output_gate)
        return y, state, None
