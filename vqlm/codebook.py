"""Vector quantization of keys: nearest code, straight-through, statistics, and learning.

``Codebook.forward`` changes nothing.  It returns what was seen as ``CodeStats``; the training loop
merges these over micro-batches and calls ``update_`` once per optimizer step, so activation
checkpointing and gradient accumulation leave the codebook as one plain step would.
Axes: B batch, G key-value head, T time, S codes, K key width, R sampled keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqlm.fused import d_normalised, normalised, square_length
from vqlm.kept import Kept

COUNT_FLOOR = 0.01
"""Least count that a sum of keys is divided by (the official implementation's)."""

SAMPLES_PER_ROW = 16
"""Keys of each row kept in the statistics as candidates for re-seeding."""

ARGMAX_GROUP = 32
"""Codes in a group of `_lowest_argmax`; 16 and 64 are slower."""

CPU_SLICE = 128
"""Tokens whose scores against all codes are compared at a time on a CPU."""

KMEANS_STEPS = 12
"""Lloyd iterations of the initialisation from data."""


class CodeStats(NamedTuple):
    """Sums over the tokens of one or more calls; mergeable, never averaged."""

    key_count: Float[Tensor, "G S"]
    """Keys assigned to each code."""
    key_sum: Float[Tensor, "G S K"]
    """Their sum."""
    error: Float[Tensor, " G"]
    """Sum of |k - code|^2."""
    energy: Float[Tensor, " G"]
    """Sum of |k|^2."""
    sample: Float[Tensor, "G R K"]
    """Some of the keys, evenly spaced in each row; not-a-number for a row of padding alone."""

    def merge(self, other: CodeStats) -> CodeStats:
        """The statistics of both sets of tokens together."""
        return CodeStats(
            self.key_count + other.key_count,
            self.key_sum + other.key_sum,
            self.error + other.error,
            self.energy + other.energy,
            torch.cat([self.sample, other.sample], 1),
        )

    def perplexity(self) -> Float[Tensor, " G"]:
        """exp(entropy) of code use per head: 1 is one code, S is all codes equally."""
        share = self.key_count / self.key_count.sum(-1, keepdim=True).clamp(min=1)
        return torch.special.entr(share).sum(-1).exp()

    def dead(self) -> Int[Tensor, " G"]:
        """Codes that no key was assigned to, per head."""
        return (self.key_count == 0).sum(-1)

    def relative_error(self) -> Float[Tensor, " G"]:
        """Squared quantization error as a share of the keys' squared length, per head."""
        return self.error / self.energy.clamp(min=1e-30)


def merge_layers(
    a: tuple[CodeStats | None, ...], b: tuple[CodeStats | None, ...]
) -> tuple[CodeStats | None, ...]:
    """``CodeStats.merge`` layer by layer; None stays None, a layer without a codebook."""
    return tuple(
        x.merge(y) if x is not None and y is not None else None for x, y in zip(a, b, strict=True)
    )


class Quantized(NamedTuple):
    """Keys after quantization."""

    code: Int[Tensor, "B G T"]
    """Index z of the nearest code."""
    key: Float[Tensor, "B G T K"]
    """The code itself, with the gradient passed straight through to the key."""
    commitment: Float[Tensor, ""]
    """Sum of |k - code|^2 over heads and real tokens; differentiable in the keys."""
    stats: CodeStats | None
    """What was seen; None if not asked for."""


def nearest_code(
    keys: Float[Tensor, "B G T K"],
    codes: Float[Tensor, "G S K"],
    half: Float[Tensor, "G S"] | None = None,
) -> Int[Tensor, "B G T"]:
    """Index of the code nearest in Euclidean distance, in at least float32; the lowest on ties.

    ``half``: what ``half_squares`` says of the codes, if that is known already.
    """
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        # |k - c|^2 / 2 = |k|^2 / 2 - k.c + |c|^2 / 2, and the first term is common to all codes.
        half = half_squares(codes) if half is None else half
        keys = keys.to(codes.dtype)
        if keys.device.type != "cpu":
            return torch.einsum("bgtk,gsk->bgts", keys, codes).sub_(half[:, None]).argmax(-1)
        best = torch.empty(keys.shape[:3], dtype=torch.long)
        for row, found in zip(keys, best, strict=True):
            # A slice's scores stay in the processor's cache.
            for part, target in zip(
                row.split(CPU_SLICE, 1), found.split(CPU_SLICE, 1), strict=True
            ):
                target.copy_(_lowest_argmax(torch.bmm(part, codes.mT).sub_(half[:, None])))
        return best


def half_squares(codes: Float[Tensor, "G S K"]) -> Float[Tensor, "G S"]:
    """|c|^2 / 2 of each code."""
    return codes.square().sum(-1) / 2


def _lowest_argmax(scores: Float[Tensor, "G n S"]) -> Int[Tensor, "G n"]:
    """``scores.argmax(-1)``, twice as fast on CPUs: torch finds maxima ten times faster than their
    places, so places are looked for among groups, then in one group."""
    n_code = scores.shape[-1]
    if n_code % ARGMAX_GROUP or n_code <= 2 * ARGMAX_GROUP:
        return scores.argmax(-1)
    groups = scores.view(-1, n_code // ARGMAX_GROUP, ARGMAX_GROUP)
    best = groups.amax(-1).argmax(-1)
    row = torch.arange(0, groups.shape[0] * groups.shape[1], groups.shape[1]) + best
    place = groups.flatten(0, 1).index_select(0, row).argmax(-1)
    return place.add_(best, alpha=ARGMAX_GROUP).view(scores.shape[:-1])


def flat_index(code: Int[Tensor, "... R T"], n_code: int) -> Int[Tensor, " n"]:
    """Index of codes of R rows in a table whose rows, of ``n_code`` entries each, are joined."""
    row = torch.arange(code.shape[-2], device=code.device)[:, None]
    return (code + row * n_code).flatten()


def look_up(codes: Float[Tensor, "G S K"], code: Int[Tensor, "B G T"]) -> Tensor:
    """codes[g, code[b, g, t]], of shape [B, G, T, K]."""
    _, n_code, width = codes.shape
    index = flat_index(code, n_code)
    return codes.reshape(-1, width).index_select(0, index).view(*code.shape, width)


def sum_by_code(
    values: Float[Tensor, "B G T V"], code: Int[Tensor, "B G T"], n_code: int
) -> Float[Tensor, "B G S V"]:
    """Sums the values of the tokens filed under each code."""
    batch, heads, _, width = values.shape
    total = values.new_zeros(batch * heads * n_code, width)
    index = flat_index(code.flatten(0, 1), n_code)
    total = total.index_add(0, index, values.reshape(-1, width))
    return total.reshape(batch, heads, n_code, width)


class _Quantize(torch.autograd.Function):
    """The chosen codes [B, G, T, K], their gradient passed straight through to the keys, and
    |k - code|^2 [B, G, T], whose gradient is 2 (k - code).

    Keeps indices, and keys as they came: before they were normalised to ``scale``, if any."""

    @staticmethod
    def forward(
        ctx: Any, came: Tensor, keys: Tensor, codes: Tensor, code: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(came, codes, code)
        ctx.scale = scale
        chosen = look_up(codes, code).to(keys.dtype)
        difference = keys - chosen
        return chosen, square_length(difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_chosen: Tensor, d_error: Tensor) -> tuple[Tensor | None, ...]:
        came, codes, code = ctx.saved_tensors
        keys = came if ctx.scale is None else normalised(came, ctx.scale)
        difference = look_up(codes, code).to(keys.dtype).neg_().add_(keys)
        d_keys = torch.addcmul(d_chosen, difference, d_error[..., None], value=2.0)
        if ctx.scale is not None:
            d_keys = d_normalised(came, ctx.scale, d_keys)
        return d_keys, None, None, None, None


class Codebook(nn.Module):
    """S codes for each key-value head, learned as running means of the keys assigned to them.

    Buffers ``key_sum`` [G, S, K] and ``key_count`` [G, S]; a code is their ratio.
    """

    key_sum: Tensor
    key_count: Tensor

    def __init__(self, heads: int, n_code: int, d_k: int) -> None:
        super().__init__()
        # The official start: short random codes (its fan-in rule counts heads and codes).  Drawn
        # beside the generator's stream, so that a seed gives a model without codebooks the same
        # weights, and twins start alike.
        with torch.random.fork_rng(devices=[]):
            codes = torch.randn(heads, n_code, d_k) / (heads * n_code) ** 0.5
        self.register_buffer("key_sum", codes)
        self.register_buffer("key_count", torch.ones(heads, n_code))
        self.kept: Kept[tuple[Tensor, Tensor]] = Kept()

    def codes(self) -> Float[Tensor, "G S K"]:
        """The codebook, a constant: no gradient reaches it."""
        return self._codes() if torch.is_grad_enabled() else self._made()[0]

    def _codes(self) -> Tensor:
        return self.key_sum / self.key_count.clamp(min=COUNT_FLOOR)[..., None]

    def _made(self) -> tuple[Tensor, Tensor]:
        """The codes, and their ``half_squares``."""
        return self.kept.get(
            lambda: (codes := self._codes(), half_squares(codes)), self.key_sum, self.key_count
        )

    def forward(
        self,
        keys: Float[Tensor, "B G T K"],
        codes: Float[Tensor, "G S K"],
        valid: Bool[Tensor, "#B T"],
        with_stats: bool = True,
        scale: float | None = None,
    ) -> Quantized:
        """Quantizes ``keys``; ``codes`` is what ``codes()`` returned, ``valid`` the tokens to learn
        from: others get their code too, but count for neither commitment nor statistics.

        ``scale``: the keys are normalised first (``fused.normalise``), which so costs no memory.
        """
        came, keys = keys, keys.detach()
        keys = keys if scale is None else normalised(keys, scale)
        half = None if torch.is_grad_enabled() else self._made()[1]
        code = nearest_code(keys, codes, half)
        quantized, error = _Quantize.apply(came, keys, codes, code, scale)
        error = error * valid[:, None]
        stats = self._stats(keys, code, error.detach(), valid) if with_stats else None
        return Quantized(code, quantized, error.sum(), stats)

    def _stats(self, keys: Tensor, code: Tensor, error: Tensor, valid: Tensor) -> CodeStats:
        weight = valid[:, None, :, None].expand_as(keys[..., :1]).to(keys.dtype)
        weighted = torch.cat([keys * weight, weight], -1)
        total = sum_by_code(weighted, code, self.key_count.shape[-1]).sum(0)
        energy = (keys.square().sum(-1) * valid[:, None]).sum((0, 2))
        return CodeStats(
            total[..., -1], total[..., :-1], error.sum((0, 2)), energy, self._sample(keys, valid)
        )

    def _sample(self, keys: Tensor, valid: Tensor) -> Tensor:
        n_real = valid.sum(1, keepdim=True).expand(keys.shape[0], 1)
        share = torch.arange(SAMPLES_PER_ROW, device=keys.device) / SAMPLES_PER_ROW
        index = (share * n_real).long()[:, None, :, None]
        picked = keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3]))
        picked = picked.masked_fill((n_real == 0)[..., None, None], torch.nan)
        return rearrange(picked, "b g r k -> g (b r) k")

    @torch.no_grad()
    def initialize_(self, keys: Float[Tensor, "G N K"], generator: torch.Generator) -> None:
        """Sets the codes to k-means centroids of ``keys``, counts to the clusters' sizes.

        Raises:
            ValueError: fewer keys than codes.
        """
        heads, n_code = self.key_count.shape
        if keys.shape[1] < n_code:
            raise ValueError(
                f"k-means got {keys.shape[1]} keys for {n_code} codes; "
                "start from a larger batch, or choose a smaller n_code"
            )
        start = torch.randperm(keys.shape[1], generator=generator)[:n_code].to(keys.device)
        codes = keys[:, start].to(self.key_sum.dtype)
        for _ in range(KMEANS_STEPS):
            code = nearest_code(keys[None], codes)
            weighted = torch.cat([keys, torch.ones_like(keys[..., :1])], -1)[None]
            total = sum_by_code(weighted, code, n_code)[0].to(codes.dtype)
            count = total[..., -1]
            means = total[..., :-1] / count.clamp(min=1)[..., None]
            codes = torch.where(count[..., None] > 0, means, codes)
        self.key_count.copy_(count.clamp(min=1))
        self.key_sum.copy_(codes * self.key_count[..., None])

    @torch.no_grad()
    def update_(
        self, stats: CodeStats, decay: float, revive_below: float = 0.0, revive_toward: float = 1.0
    ) -> None:
        """One step of exponential moving averages: sum <- decay sum + (1 - decay) new sum.

        ``revive_below`` > 0 also moves every code whose count is below that share of the mean
        count next to one of the sampled keys, the worst quantized first: so far on the way
        from the code that the key has now as ``revive_toward`` says; 1 is the key itself.

        Keys without clusters want less than 1.  In many dimensions two of them are farther from
        each other than from their mean, so a code that is a key wins no other key from it, and is
        dead again soon; half way it wins those on its side.
        """
        self.key_sum.lerp_(stats.key_sum.to(self.key_sum.dtype), 1 - decay)
        self.key_count.lerp_(stats.key_count.to(self.key_count.dtype), 1 - decay)
        if revive_below > 0:
            self._revive_(stats.sample.to(self.key_sum.dtype), revive_below, revive_toward)

    def _revive_(self, sample: Tensor, below: float, toward: float) -> None:
        codes = self.codes()
        chosen = look_up(codes, nearest_code(sample[None], codes))[0]
        error = (sample - chosen).square().sum(-1).nan_to_num(nan=-1.0)
        error, worst = error.sort(-1, descending=True)
        mean = self.key_count.mean(-1, keepdim=True)
        n_try = min(sample.shape[1], self.key_count.shape[1])
        rarest = self.key_count.argsort(-1)[:, :n_try]
        head = torch.arange(len(codes), device=codes.device)[:, None]
        dead = (self.key_count[head, rarest] < below * mean) & (error[:, :n_try] >= 0)
        count = torch.where(dead, mean, self.key_count[head, rarest])
        place = chosen.lerp(sample, toward)[head, worst[:, :n_try]]
        key = place * mean[..., None]
        self.key_sum[head, rarest] = torch.where(dead[..., None], key, self.key_sum[head, rarest])
        self.key_count[head, rarest] = count
