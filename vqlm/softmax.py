"""The quadratic twin and the sliding window: dense softmax attention over unquantized keys.

Projections, normalisation and relative bias are those of VQ-attention, and so is the interface, so
that a comparison changes one word of the config.  Attention itself is torch's
``scaled_dot_product_attention``, called block by block of queries, so that the additive bias is a
slice of L rows and never the whole T x T matrix.
Axes: B batch, H query head, G key-value head, T time, L block, M window, P remembered keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqlm.config import LMConfig
from vqlm.layers import AttentionProjections, Before, RelativeBias, relative_scores, rotate
from vqlm.segments import Segments, last_slots


class SoftmaxState(NamedTuple):
    """Remembered keys and values: P grows with the stream, or is the window M."""

    key: Float[Tensor, "B G P K"]
    """The newest last; rows that are shorter than others have unused slots first."""
    value: Float[Tensor, "B G P V"]
    """Their values."""
    length: Int[Tensor, " B"]
    """Tokens of the current document seen so far; only so many of the newest slots count."""


def softmax_attention(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G T K"],
    value: Float[Tensor, "B G T V"],
    bias: RelativeBias,
    state: SoftmaxState,
    segments: Segments = Segments(),  # noqa: B008  (immutable)
    *,
    block: int,
    window_only: bool,
) -> tuple[Float[Tensor, "B H T V"], SoftmaxState]:
    """Causal attention within each document, over all of it or over the last M + 1 tokens.

    ``block`` decides how many queries are handled at once, never the result.
    """
    n_token, n_old = query.shape[2], state.key.shape[2]
    window = bias.rows.shape[1] - 1
    key = torch.cat([state.key, key.to(state.key.dtype)], 2)
    value = torch.cat([state.value, value.to(state.value.dtype)], 2)
    documents = segments.joined_documents(state.length, n_old, n_token)
    share = query.shape[1] // key.shape[1]
    wide_key, wide_value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    outputs = []
    for begin in range(0, n_token, block):
        end = min(begin + block, n_token)
        first = max(0, n_old + begin - window) if window_only else 0
        reach = slice(first, n_old + end)
        part = query[:, :, begin:end]
        scores = _bias_of_block(part, bias, documents[:, reach], window_only)
        content = (part + bias.content[:, None]).to(wide_key.dtype)
        outputs.append(
            F.scaled_dot_product_attention(
                content, wide_key[:, :, reach], wide_value[:, :, reach], scores.to(content.dtype),
                scale=1.0,
            )
        )  # fmt: skip
    length = segments.advance(state.length, n_token)
    # What is older than every row's document will never be looked at again.
    kept = window if window_only else int(length.max())
    key = last_slots(key, kept, n_token, segments.lengths, 2)
    value = last_slots(value, kept, n_token, segments.lengths, 2)
    return torch.cat(outputs, 2), SoftmaxState(key, value, length)


def _bias_of_block(
    query: Tensor, bias: RelativeBias, documents: Int[Tensor, "B W"], window_only: bool
) -> Float[Tensor, "B H L W"]:
    """Relative scores of the last M + L columns, -inf at keys that may not be seen."""
    n_query, n_key = query.shape[2], documents.shape[1]
    scores = relative_scores(query + bias.position[:, None], bias.rows)
    extra = n_key - scores.shape[-1]
    scores = F.pad(scores, (extra, 0)) if extra >= 0 else scores[..., -extra:]
    column = torch.arange(n_key, device=query.device) - (n_key - n_query)
    distance = torch.arange(n_query, device=query.device)[:, None] - column
    allowed = distance >= 0
    if window_only:
        allowed = allowed & (distance < bias.rows.shape[1])
    own = documents[:, n_key - n_query :]
    visible = allowed & (own[:, :, None] == documents[:, None, :])
    return scores.masked_fill(~visible[:, None], float("-inf"))


class SoftmaxAttention(nn.Module):
    """Softmax attention with VQ-attention's projections: ``y, state, aux = mixer(x, state)``."""

    window_only = False

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.project = AttentionProjections(config)

    def init_state(self, batch_size: int) -> SoftmaxState:
        """The empty state of ``batch_size`` rows; a window has all its slots from the start."""
        like = self.project.content_bias
        n_slot = self.config.window if self.window_only else 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=like.dtype, device=like.device)

        groups = self.config.kv_heads
        return SoftmaxState(
            zeros(groups, n_slot, self.config.d_k),
            zeros(groups, n_slot, self.config.d_v),
            zeros().long(),
        )

    def placed(
        self,
        query: Float[Tensor, "B H T K"],
        key: Float[Tensor, "B G T K"],
        position: Int[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G T K"]]:
        """Both turned to their positions, in a window with rotary positions."""
        if not self.window_only or self.config.positions != "rotary":
            return query, key
        base = self.config.position_base
        return rotate(query, position, base), rotate(key, position, base)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: SoftmaxState | None = None,
        segments: Segments = Segments(),  # noqa: B008  (immutable)
        with_stats: bool | None = None,
        seed: int | None = None,
        before: Before | None = None,
    ) -> tuple[Float[Tensor, "B T D"], SoftmaxState, None]:
        """As ``VQAttention.forward``; there is no codebook, so aux is None."""
        state = self.init_state(x.shape[0]) if state is None else state
        query, key, value, gate = self.project(x, before=before)
        query, key = self.placed(query, key, segments.positions(state.length, x.shape[1]))
        if segments.cut is not None:
            state = state._replace(
                key=segments.cut.newest_before(key, state.key, 2),
                value=segments.cut.newest_before(value, state.value, 2),
            )
        heads, state = softmax_attention(
            query, key, value, self.project.bias(seed), state, segments,
            block=self.config.block, window_only=self.window_only,
        )  # fmt: skip
        return self.project.merge(heads.to(x.dtype), gate), state, None


class WindowAttention(SoftmaxAttention):
    """Softmax attention over the last M + 1 tokens alone; its state has constant size."""

    window_only = True
