"""What all mixers share: norms, projections, the relative position bias, the SwiGLU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqlm.config import LMConfig
from vqlm.fused import at_least_float32, gated_linear, norm, normalise
from vqlm.kept import Kept
from vqlm.segments import last_slots

MOST_SCORE = 40.0
"""The largest score of a query and a key that a learned temperature may make, OVQ's among them:
exp(-2 * 40) is still a float32."""


def drop(x: Tensor, probability: float, seed: int | None = None) -> Tensor:
    """Dropout of ``x`` [...]: elements become 0 with ``probability``, the others grow by
    1 / (1 - probability).

    ``seed``: draw from a generator of its own, so that the same seed drops the same elements in
    every call; None: from torch's.
    """
    if probability == 0:
        return x
    if seed is None:
        return F.dropout(x, probability)
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.rand(x.shape, device=x.device, generator=generator) >= probability
    return x * kept.to(x.dtype) / (1 - probability)


class RelativeBias(NamedTuple):
    """The Transformer-XL bias of one mixer (Dai et al. 2019), as attention needs it."""

    content: Float[Tensor, "H K"]
    """u, added to every query before it meets a key or a code."""
    position: Float[Tensor, "H K"]
    """w, added to every query before it meets a distance row."""
    rows: Float[Tensor, "H distances K"]
    """r_d for the distances d = 0 ... M."""


class Projected(NamedTuple):
    """Queries, keys, values and the gate of one call."""

    query: Float[Tensor, "B H T K"]
    key: Float[Tensor, "B G T K"]
    value: Float[Tensor, "B G T V"]
    gate: Float[Tensor, "B T HV"] | None
    """Before its SiLU."""


class Before(NamedTuple):
    """What a mixer needs whose keys are those of the token before (``shifted_keys``)."""

    x: Float[Tensor, "B 1 D"]
    """The mixer's input at the last token before the call; anything where there is none."""
    begins: Bool[Tensor, "B T"]
    """True at the first token of a document, whose key is its own."""

    def keys(self, key: Float[Tensor, "B T GK"], key_first: nn.Module) -> Float[Tensor, "B T GK"]:
        """Keys of the token before, from each token's own; ``key_first`` maps inputs to keys and
        then what else there is."""
        first = key_first(self.x)[..., : key.shape[-1]].to(key.dtype)
        return torch.where(self.begins[..., None], key, torch.cat([first, key[:, :-1]], 1))


def projection_widths(config: LMConfig) -> list[int]:
    """How many keys, values and gates ``project`` finds beside each other."""
    groups, k, v = config.kv_heads, config.d_k, config.d_v
    return [groups * k, groups * v, config.n_head * v if config.gated else 0]


def project(
    x: Float[Tensor, "B T D"], query_layer: nn.Module, key_value_gate: nn.Module,
    config: LMConfig, before: Before | None = None,
) -> Projected:  # fmt: skip
    """Queries and keys of any length, values, and the gate if there is one.

    ``before``: keys are those of the token before.
    """
    key, value, gate = key_value_gate(x).split(projection_widths(config), -1)
    key = key if before is None else before.keys(key, key_value_gate)
    query = rearrange(query_layer(x), "b t (h k) -> b h t k", k=config.d_k)
    key = rearrange(key, "b t (g k) -> b g t k", k=config.d_k)
    value = F.silu(value) if config.layer == "gau" else value
    value = rearrange(value, "b t (g v) -> b g t v", v=config.d_v)
    return Projected(query, key, value, gate if config.gated else None)


CACHE_SCORE = 20.0
"""The largest score of a query and a key that begin as a cache."""


@torch.no_grad()
def begin_alike_(query: nn.Linear, key_first: nn.Linear, n_group: int, d_k: int) -> None:
    """Sets the rows of ``key_first`` that make keys to those of the first query head that each
    key-value head serves: keys of the token before are then like the query where what comes next
    is, and a layer begins as a cache of what was read (Grave et al. 2017)."""
    heads = query.weight.unflatten(0, (n_group, -1, d_k))[:, 0]
    key_first.weight[: n_group * d_k] = heads.flatten(0, 1)


class Norm(nn.Module):
    """Root-mean-square norm with gain and bias: g x / sqrt(mean(x^2) + 1e-6) + b."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalises the last axis."""
        return norm(x, self.gain, self.bias)


def sinusoid(
    position: Int[Tensor, "..."], width: int, base: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... D"]:
    """All sines, then all cosines, of ``position`` times base^(-2m/width), m = 0 ... width/2-1."""
    # Half precision has no whole numbers beyond some hundreds.
    wide = torch.promote_types(dtype, torch.float32)
    m = torch.arange(width // 2, device=position.device, dtype=wide)
    angle = position[..., None].to(wide) * base ** (-2 * m / width)
    return torch.cat([angle.sin(), angle.cos()], -1).to(dtype)


def rotate(
    x: Float[Tensor, "B A T K"], position: Int[Tensor, "B T"], base: float
) -> Float[Tensor, "B A T K"]:
    """Rotary positions (Su et al. 2021): pair m, elements m and m + K/2, turned by the angle
    position * base^(-2m/K), so that a score depends on the distance of query and key alone."""
    sine, cosine = sinusoid(position, x.shape[-1], base, x.dtype)[:, None].chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class ShortConvolution(nn.Module):
    """A causal convolution of each channel by itself: y_t = sum_i w_i x_(t-i), within a document.

    What it remembers of a stream are its last inputs, ``width`` - 1 of them.
    """

    def __init__(self, n_channel: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, n_channel).uniform_(-1, 1) / width**0.5)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        recent: Float[Tensor, "B past D"],
        position: Int[Tensor, "B T"],
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B past D"]]:
        """The convolved rows, and the memory after them.

        ``position``: of each token in its document; nothing before its start counts.  ``lengths``:
        real tokens of each row, which come first; None: all.
        """
        n_token, past = x.shape[1], recent.shape[1]
        stream = torch.cat([recent.to(x.dtype), x], 1)
        y = self.weight[0] * x
        for i in range(1, past + 1):
            earlier = stream[:, past - i : past - i + n_token]
            y = y + self.weight[i] * earlier * (position >= i)[..., None]
        return y, last_slots(stream, past, n_token, lengths, 1)


def relative_scores(
    query: Float[Tensor, "B H L K"], rows: Float[Tensor, "H distances K"]
) -> Float[Tensor, "B H L W"]:
    """q_i . r_(M+i-c) for columns c of [M memory slots, L tokens], W = M + L; 0 off the band.

    Column c lies at distance M + i - c from query i.  The products are made once for the M + 1
    distances and moved into place by the shift of Transformer-XL: append L zeros to each row,
    flatten, drop the last L, and read again with rows one shorter; row i has moved i to the right.
    """
    n_query = query.shape[2]
    by_distance = torch.einsum("bhlk,hmk->bhlm", query, rows.flip(1))
    padded = F.pad(by_distance, (0, n_query)).flatten(2)
    width = rows.shape[1] - 1 + n_query
    return padded[..., : n_query * width].unflatten(2, (n_query, width))


class AttentionProjections(nn.Module):
    """The parameters of an attention mixer; the same for all of them, so that twins compare.

    Queries and keys are normalised per head and scaled by K^(-1/4), so that a score is
    sqrt(K) times a cosine; with ``learned_temperature``, times a learned factor of each head.
    Gated: SiLU on the gate; in the paper's GAU also on the values; with ``output_gate`` heads are
    normalised before.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        heads, k, v = config.n_head, config.d_k, config.d_v
        self.query = nn.Linear(config.d_model, heads * k, bias=False)
        n_row = sum(projection_widths(config))
        self.key_value_gate = nn.Linear(config.d_model, n_row, bias=False)
        self.relative = config.positions == "relative"
        if self.relative:
            self.position = nn.Linear(config.d_model, heads * k, bias=False)
        self.output = nn.Linear(heads * v, config.d_model, bias=False)
        self.content_bias: Tensor = nn.Parameter(torch.zeros(heads, k))
        if self.relative:
            self.position_bias: Tensor = nn.Parameter(torch.zeros(heads, k))
        self.scale = k**-0.25
        self.learned_temperature = config.learned_temperature
        if self.learned_temperature:
            self.log_factor = nn.Parameter(torch.zeros(heads))
        self.kept: Kept[RelativeBias] = Kept()

    def forward(
        self, x: Float[Tensor, "B T D"], raw: bool = False, before: Before | None = None
    ) -> Projected:
        """Normalised queries and keys, values, and the gate if there is one.

        ``raw``: queries and keys before they are normalised, for what does that itself and so
        need not keep both.  ``before``: keys are those of the token before.
        """
        own = project(x, self.query, self.key_value_gate, self.config, before)
        if raw:
            return own
        return own._replace(query=self.ready(own.query), key=normalise(own.key, self.scale))

    def begin_as_cache_(self) -> None:
        """Keys begin as queries, see ``begin_alike_``; scores at ``CACHE_SCORE``, if learned."""
        begin_alike_(self.query, self.key_value_gate, self.config.kv_heads, self.config.d_k)
        if self.learned_temperature:
            nn.init.constant_(self.log_factor, math.log(CACHE_SCORE / math.sqrt(self.config.d_k)))

    def ready(self, query: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H T K"]:
        """Queries normalised, and with ``learned_temperature`` times the factor of their head."""
        query = normalise(query, self.scale)
        if not self.learned_temperature:
            return query
        most = math.log(MOST_SCORE / math.sqrt(query.shape[-1]))
        return query * self.log_factor.clamp(max=most).exp().to(query.dtype)[:, None, None]

    def bias(self, seed: int | None = None) -> RelativeBias:
        """The relative position bias; its sinusoids pass through ``drop`` with this ``seed``.

        Without relative positions, the content bias alone."""
        if self.training:
            return self._bias(seed)
        sources = [self.content_bias]
        if self.relative:
            sources += [self.position_bias, self.position.weight]
        return self.kept.get(lambda: self._bias(None), *sources)

    def _bias(self, seed: int | None) -> RelativeBias:
        if not self.relative:
            content = self.scale * at_least_float32(self.content_bias)
            rows = content.new_zeros(len(content), self.config.window + 1, self.config.d_k)
            return RelativeBias(content, torch.zeros_like(content), rows)
        distance = torch.arange(self.config.window + 1, device=self.content_bias.device)
        waves = sinusoid(
            distance, self.config.d_model, self.config.position_base, self.content_bias.dtype
        )
        waves = drop(waves, self.config.dropout_sinusoid, seed) if self.training else waves
        rows = self.position(waves)
        rows = rearrange(rows, "m (h k) -> h m k", k=self.config.d_k)
        parts = self.content_bias, self.position_bias, rows
        return RelativeBias(*(self.scale * at_least_float32(part) for part in parts))

    def merge(self, heads: Float[Tensor, "B H T V"], gate: Tensor | None) -> Tensor:
        """Joins the heads, applies the gate, projects back to [B, T, D]."""
        return gated_output(self.output, heads, gate, self.config.output_gate)


def gated_output(
    output: nn.Module, heads: Float[Tensor, "B H T V"], gate: Float[Tensor, "B T HV"] | None,
    normal: bool,
) -> Float[Tensor, "B T D"]:  # fmt: skip
    """Joins the heads, multiplies by silu(gate) if there is a gate, and projects.

    ``normal``: each head is normalised before (``fused.normalise``): the mean of many values is
    small, and what is small is learned late.
    """
    heads = normalise(heads, 1.0).to(heads.dtype) if normal else heads
    joined = rearrange(heads, "b h t v -> b t (h v)")
    return output(joined) if gate is None else _gated(output, gate, joined)


def _gated(output: nn.Module, gate: Tensor, value: Tensor) -> Tensor:
    """``gated_linear``; what somebody has put in place of the layer, or hooked to it, is called."""
    if type(output) is not nn.Linear or output._forward_hooks or output._forward_pre_hooks:
        return output(F.silu(gate) * value)
    return gated_linear(gate, value, output.weight)


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), projected back (Shazeer 2020); W1 and W2 are one product."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(d_model, 2 * width, bias=False)
        self.output = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Position by position."""
        gate, value = self.input(x).chunk(2, -1)
        return _gated(self.output, gate, value)
