"""VQ-attention of one token after a state, without a gradient: what decoding does at every step.

The same mathematics as ``vq_kernel``, for one query: no blocks, no schedule, and nothing that waits
for the device.  Its cost is that of reading the state and writing a new one, at any position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqlm.codebook import flat_index


class Step(NamedTuple):
    """What is read.  Joined: the M memory slots and the new token, all of one dtype."""

    query: Float[Tensor, "B H 1 K"]
    code: Int[Tensor, "B G joined"]
    key: Float[Tensor, "B G joined K"]
    """Quantized."""
    value: Float[Tensor, "B G joined V"]
    content: Float[Tensor, "H K"]
    position: Float[Tensor, "H K"]
    rows: Float[Tensor, "H joined K"]
    """For distances 0 to M."""
    codes: Float[Tensor, "G S K"]
    value_sum: Float[Tensor, "B G slots V"]
    value_count: Float[Tensor, "B G slots"]
    length: Int[Tensor, " B"]
    """Tokens of the document before this one."""


def attend_once(x: Step) -> Float[Tensor, "B H 1 V"]:
    """Output of the one query."""
    batch, heads, _, width = x.query.shape
    groups, joined = x.key.shape[1:3]
    content = (x.query + x.content[:, None]).view(batch, groups, -1, width)
    by_distance = (x.query + x.position[:, None]) @ x.rows.mT
    recent = (content @ x.key.mT).view(batch, heads, joined) + by_distance[:, :, 0].flip(-1)
    age = torch.arange(joined - 1, -1, -1, device=recent.device)
    recent = recent.masked_fill_((age > x.length[:, None])[:, None], -torch.inf)
    recent = recent.view(batch, groups, -1, joined)
    if x.value_count.shape[2] == 0:
        return (recent.softmax(-1) @ x.value).view(batch, heads, 1, -1)
    count = x.value_count[:, :, None]
    slots = (content @ x.codes.mT).masked_fill_(count == 0, -torch.inf)
    largest = torch.maximum(recent.amax(-1, keepdim=True), slots.amax(-1, keepdim=True))
    recent, slots = recent.sub_(largest).exp_(), slots.sub_(largest).exp_()
    norm = recent.sum(-1, keepdim=True) + slots @ count.mT
    return ((recent @ x.value + slots @ x.value_sum) / norm).view(batch, heads, 1, -1)


def file_once(x: Step) -> tuple[Float[Tensor, "B G slots V"], Float[Tensor, "B G slots"]]:
    """Sums and counts of the slots after the token: the oldest key is filed, if the window was
    full.  New tensors."""
    batch, groups, n_slot, width = x.value_sum.shape
    if n_slot == 0:
        return x.value_sum, x.value_count
    full = (x.length >= x.key.shape[2] - 1).to(x.value.dtype)[:, None].expand(-1, groups)
    index = flat_index(x.code[:, :, :1].reshape(-1, 1), n_slot)
    oldest = x.value[:, :, 0] * full[..., None]
    sums = x.value_sum.reshape(-1, width).index_add(0, index, oldest.view(-1, width))
    counts = x.value_count.flatten().index_add(0, index, full.reshape(-1))
    return sums.view_as(x.value_sum), counts.view_as(x.value_count)
