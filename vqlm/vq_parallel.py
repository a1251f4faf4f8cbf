"""VQ-attention with all blocks of a call at once, instead of one after another.

``vq.vq_attention`` walks from block to block, because a block needs the state that the block
before it leaves behind.  That state is a sum: what a block adds to the slots depends on the block
alone.  So all states can be had first, and then every block is a row of its own:

1. the values that leave the window during each block, summed by code: [B, N, G, S, V];
2. sums over all earlier blocks, the state at the start of each block (a *reduction*, below);
3. ``vq.vq_attention`` once, on B x N rows of one block each.

Outputs, state and gradients, also which pairs have one, are those of ``vq.vq_attention``.

Reductions.  "matmul": one product with a triangular matrix of zeros and ones; N^2 S V
multiplications, on hardware that likes products.  "scan": a running sum over the blocks, N
additions of S V numbers one after another.  (Scans of log2(N) depth and ``torch.cumsum`` took 2.5
to 13 times as long on a CPU core, since they go over the memory more often.)  Where a document
begins between blocks the sums begin anew, in both.

When it wins and loses.  The sums of all blocks exist at once, B N G S V numbers and a small
multiple of that with the backward pass: N times the slots of the serial loop, so memory grows with
T S V / L.  Multiplications are not saved.  What is saved is the wait between blocks, which matters
where one block is too small to fill the device.  It fills a CPU core: there this is up to 1.1
times as fast as the serial loop where slots are few (multi-query, 2,048 tokens) and down to 0.7
times where they are many (one head of width 1,024, 8,192 tokens; 512 codes and blocks of 128 both).
No other device has been measured.

Axes: as in ``vq``; N blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from vqlm.codebook import Quantized, sum_by_code
from vqlm.config import require_known
from vqlm.layers import RelativeBias
from vqlm.segments import Segments
from vqlm.vq import VQState, vq_attention

REDUCTIONS = ("matmul", "scan")
"""Ways to sum over all earlier blocks."""


def vq_attention_parallel(
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
    reduction: str = "matmul",
) -> tuple[Float[Tensor, "B H T V"], VQState]:
    """What ``vq.vq_attention`` returns for the same arguments, up to rounding.

    ``reduction`` is one of ``REDUCTIONS``.  Outputs at padding are finite and meaningless.

    Raises:
        ValueError: an unknown reduction, or ``bias`` was made for another window than ``state``.
    """
    require_known("reduction", reduction, REDUCTIONS)
    batch, _, n_token, _ = query.shape
    n_block = -(-n_token // block)
    if n_block <= 1:
        return vq_attention(
            query, keys, value, codes, bias, state, segments, block=block, cache_grad=cache_grad
        )
    short = n_block * block - n_token  # of the last block
    tokens = keys._replace(
        code=F.pad(keys.code, (0, short)),
        key=F.pad(keys.key.to(state.key.dtype), (0, 0, 0, short)),
    )
    value = F.pad(value.to(state.value.dtype), (0, 0, 0, short))
    starting = _starting_states(state, tokens, value, segments, n_token, block, reduction)
    if not cache_grad:
        starting = VQState(*(torch.cat([x[:, :1], x[:, 1:].detach()], 1) for x in starting))
    n_real = segments.n_real(state.length, n_token)
    rows = tokens._replace(
        code=rearrange(tokens.code, "b g (n l) -> (b n) g l", l=block),
        key=rearrange(tokens.key, "b g (n l) k -> (b n) g l k", l=block),
    )
    out, after = vq_attention(
        rearrange(F.pad(query, (0, 0, 0, short)), "b h (n l) k -> (b n) h l k", l=block),
        rows, rearrange(value, "b g (n l) v -> (b n) g l v", l=block), codes, bias,
        VQState(*(x.flatten(0, 1) for x in starting)),
        _segments_of_blocks(segments, n_real, n_token, block), block=block, cache_grad=cache_grad,
    )  # fmt: skip
    out = rearrange(out, "(b n) h l v -> b h (n l) v", b=batch)[:, :, :n_token]
    # A row's state is the one after the last block that has a real token of it.
    last = (n_real - 1).clamp(min=0) // block
    row = torch.arange(batch, device=last.device)
    return out, VQState(*(x.unflatten(0, (batch, n_block))[row, last] for x in after))


def _segments_of_blocks(
    segments: Segments, n_real: Int[Tensor, " B"], n_token: int, block: int
) -> Segments:
    """The same tokens as rows of one block each."""
    short = -n_token % block
    lengths, starts = None, segments.starts
    if short or segments.lengths is not None:
        begin = torch.arange(0, n_token, block, device=n_real.device)
        lengths = (n_real[:, None] - begin).clamp(0, block).flatten()
    if starts is not None:
        starts = rearrange(F.pad(starts, (0, short)), "b (n l) -> (b n) l", l=block)
    return Segments(lengths, starts)


def _starting_states(
    state: VQState,
    tokens: Quantized,
    value: Float[Tensor, "B G NL V"],
    segments: Segments,
    n_token: int,
    block: int,
    reduction: str,
) -> VQState:
    """The state at the start of each of the N blocks: every field has axes [B, N, ...].

    ``tokens`` and ``value`` are ``n_token`` tokens, filled up to whole blocks.  Of a row that has
    ended before a block, the state is that of a row whose padding is real: it is not used.
    """
    window, n_block = state.key.shape[2], value.shape[2] // block
    code, key, value = (
        torch.cat([old, new], 2)
        for old, new in ((state.code, tokens.code), (state.key, tokens.key), (state.value, value))
    )
    seen = [x.unfold(2, window, block)[:, :, :n_block].transpose(1, 2) for x in (code, key, value)]

    position = segments.positions(state.length, n_token)
    length = torch.cat([state.length[:, None], position[:, block - 1 :: block] + 1], 1)[:, :n_block]
    if state.value_count.shape[2] == 0:
        total = repeat(state.value_sum, "b ... -> b n ...", n=n_block)
        count = repeat(state.value_count, "b ... -> b n ...", n=n_block)
    else:
        documents = segments.joined_documents(state.length, window, n_token)
        # Autocast would round sums and counts, which the serial loop doesn't do either.
        with torch.autocast(value.device.type, enabled=False):
            total, count = _slots(state, code, value, documents, block, n_block, reduction)
    return VQState(seen[0], seen[1].mT, seen[2].mT, total, count, length)


def _slots(
    state: VQState,
    code: Int[Tensor, "B G W"],
    value: Float[Tensor, "B G W V"],
    documents: Int[Tensor, "B C"],
    block: int,
    n_block: int,
    reduction: str,
) -> tuple[Float[Tensor, "B N G S V"], Float[Tensor, "B N G S"]]:
    """Sums of values and counts in the slots at the start of each block.

    ``code``, ``value`` and ``documents`` are of [M memory slots, tokens].
    """
    # What leaves the window during block n is read by block n + 1, so what leaves last by none.
    n_leaving = (n_block - 1) * block
    left = documents[:, :n_leaving].unflatten(1, (n_block - 1, block))
    newest = left[:, :, -1]
    weight = (left == newest[..., None]).to(value.dtype)[:, :, None, :, None]

    def by_block(x: Tensor) -> Tensor:
        return rearrange(x[:, :, :n_leaving], "b g (n l) v -> b n g l v", l=block)

    index = by_block(code[..., None]).flatten(0, 1)[..., 0]
    n_code = state.value_count.shape[2]
    weight = weight.expand(-1, -1, code.shape[1], -1, -1)

    def summed(x: Tensor, before: Tensor) -> Tensor:
        sums = sum_by_code(x.flatten(0, 1), index, n_code).unflatten(0, (-1, n_block - 1))
        return torch.cat([before[:, None], sums], 1)

    filed = torch.cat([torch.zeros_like(newest[:, :1]), newest], 1)  # what came in is document 0
    total = _REDUCE[reduction](summed(by_block(value) * weight, state.value_sum), filed)
    # A scan adds whole numbers exactly; a product may be made in a narrower type (TF32).
    count = _scan(summed(weight, state.value_count[..., None]), filed)[..., 0]

    # As in `vq`, a document's first block finds empty slots.
    window = state.key.shape[2]
    current = documents[:, window - 1 + block :: block][:, : n_block - 1]
    current = torch.cat([torch.zeros_like(newest[:, :1]), current], 1)
    same = (current == filed)[:, :, None, None]
    return total * same[..., None], count * same


def _matmul(
    x: Float[Tensor, "B N G S V"], document: Int[Tensor, "B N"]
) -> Float[Tensor, "B N G S V"]:
    """Sums of each block and all blocks before it that are of its document; a product."""
    same = (document[:, :, None] == document[:, None, :]).tril()
    return torch.einsum("bnm,bmgsv->bngsv", same.to(x.dtype), x)


def _scan(
    x: Float[Tensor, "B N G S V"], document: Int[Tensor, "B N"]
) -> Float[Tensor, "B N G S V"]:
    """The same sums, each from the one before it; starts again where a document does."""
    same = (document[:, 1:] == document[:, :-1]).to(x.dtype)[:, :, None, None, None]
    first, *rest = x.unbind(1)
    sums = [first]
    for new, goes_on in zip(rest, same.unbind(1), strict=True):
        sums.append(torch.addcmul(new, sums[-1], goes_on))
    return torch.stack(sums, 1)


_REDUCE = {"matmul": _matmul, "scan": _scan}
