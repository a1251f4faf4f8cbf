"""vqlm's attention in other people's models: Llama-, Qwen- and GPT-2-style models of transformers.

    import vqlm
    vqlm.patch(model, mixer="ovq", n_entry=256, chunk=64)     # weights stay, and so do their names

Every patched layer keeps its own projections, norms of queries and keys, and rotary positions; only
what happens between queries, keys and values is replaced, by ``patch_attention.py``.  Keys enter it
as the model makes them, turned to their positions.

    mixer     what a query sees beside the open chunk and the window before it
    "ovq"     a dictionary of n_entry means, learned while reading; with n_entry >= the number of
              tokens and growth="eager" the model computes what it did before
    "vq"      per-code means under a codebook of n_entry codes, learned in ``adapt``
    "window"  nothing

The cache of a patched layer has constant size.  ``adapt.py`` brings the quality back.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache

from vqlm.attention_layers import N_TRIED, attention_modules, require_same
from vqlm.codebook import Codebook, CodeStats
from vqlm.config import require_known
from vqlm.dictionary import GROWTH
from vqlm.hf_cache import StateLayer
from vqlm.patch_attention import DictionaryState, dictionary_attention, empty_state
from vqlm.segments import Segments

PATCH_MIXERS = ("ovq", "vq", "window")


@dataclass(frozen=True)
class PatchConfig:
    """Every number that decides what a patched layer computes.

    Raises:
        ValueError: a size out of range, or an unknown name.
    """

    mixer: str = "ovq"
    """"ovq", "vq" or "window"."""
    n_entry: int = 256
    """Entries N of the dictionary, or codes, of each key-value head; "window" has none."""
    chunk: int = 64
    """Tokens L that are filed together; a query sees its own chunk one by one."""
    window: int = 64
    """Tokens before the chunk that stay one by one, a multiple of chunk; for "window" the
    tokens before itself that a query sees."""
    growth: str = "eager"
    """How the dictionary of "ovq" grows: a key of ``dictionary.GROWTH``."""

    def __post_init__(self) -> None:
        require_known("mixer", self.mixer, PATCH_MIXERS)
        require_known("growth", self.growth, GROWTH)
        if self.n_entry < 1 or self.chunk < 1 or self.window < 0:
            raise ValueError(
                f"PatchConfig: n_entry={self.n_entry}, chunk={self.chunk}, window={self.window}, "
                "but n_entry and chunk must be at least 1 and window at least 0"
            )
        if self.mixer != "window" and self.window % self.chunk:
            raise ValueError(
                f"PatchConfig: window={self.window} is no multiple of chunk={self.chunk}; "
                "choose one, or 0"
            )

    @property
    def n_recent(self) -> int:
        """Slots of tokens seen one by one: the open chunk, and the window in whole chunks."""
        return self.chunk * (1 + -(-self.window // self.chunk))


class _Heads(NamedTuple):
    query: Float[Tensor, "B H T K"]
    key: Float[Tensor, "B G T K"]
    value: Float[Tensor, "B G T V"]


def _split_heads(x: Tensor, width: int) -> Float[Tensor, "B H T W"]:
    return rearrange(x, "b t (h w) -> b h t w", w=width)


def _project_rotary(layer: Any, x: Tensor, positions: Any) -> _Heads:
    """Llama, Qwen and their like: separate projections; norms and rotary if there are any."""
    query, key, value = (
        _split_heads(projection(x), layer.head_dim)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if hasattr(layer, "q_norm"):
        query, key = layer.q_norm(query), layer.k_norm(key)
    if positions is not None:
        query, key = layer.rotate(query, key, *positions)
    return _Heads(query, key, value)


def _project_gpt2(layer: Any, x: Tensor, positions: Any) -> _Heads:
    """GPT-2: one projection for all three; positions are in the embedding."""
    query, key, value = layer.c_attn(x).chunk(3, -1)
    return _Heads(*(_split_heads(part, layer.head_dim) for part in (query, key, value)))


class _Family(NamedTuple):
    """What a family of models calls its parts."""

    projections: frozenset[str]
    optional: frozenset[str]
    project: Callable[[Any, Tensor, Any], _Heads]
    output: str


FAMILIES = {
    "rotary": _Family(
        frozenset(["q_proj", "k_proj", "v_proj", "o_proj"]), frozenset(["q_norm", "k_norm"]),
        _project_rotary, "o_proj",
    ),
    "gpt2": _Family(
        frozenset(["c_attn", "c_proj"]), frozenset(["attn_dropout", "resid_dropout"]),
        _project_gpt2, "c_proj",
    ),
}  # fmt: skip


class PatchedAttention(nn.Module):
    """Takes the place of an attention module, and its parts under their own names.

    Dropout on attention weights is left out: there is no matrix of weights to drop from.

    Raises:
        ValueError: a module of an unknown family, or one with something that has no place here.
    """

    def __init__(self, original: nn.Module, config: PatchConfig) -> None:
        super().__init__()
        self.config_of_patch = config
        self.family = _family_of(original)
        for name, part in original.named_children():
            self.add_module(name, part)
        facts: Any = original
        self.layer_idx: int = facts.layer_idx
        self.head_dim: int = facts.head_dim
        self.scaling = float(facts.scaling)
        self.rotate = getattr(sys.modules[type(original).__module__], "apply_rotary_pos_emb", None)
        self.seen: CodeStats | None = None
        """Statistics of the codebook of the last call in training mode ("vq")."""
        self.commitment: Tensor | None = None
        """Sum of |k - code|^2 over its heads and tokens, differentiable ("vq")."""
        if config.mixer == "vq":
            weight = next(original.parameters())
            groups = _n_groups(original, self.head_dim)
            self.codebook = Codebook(groups, config.n_entry, self.head_dim).to(weight.device)

    def heads(self, x: Float[Tensor, "B T D"], positions: Any = None) -> _Heads:
        """Queries, keys (both turned to their positions) and values."""
        return FAMILIES[self.family].project(self, x, positions)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B T D"], None]:
        """As the module that it replaces; there are no attention weights to return.

        ``attention_mask``: [B, columns so far] or [B, 1, T, columns], as in ``real_tokens``.

        Raises:
            ValueError: a mask that is more than causality and padding, or a cache that an
                unpatched model has filled.
        """
        n_token = hidden_states.shape[1]
        n_seen = 0 if cache is None else _n_seen(cache, self.layer_idx)
        segments = Segments.of(real_tokens(attention_mask, n_token, n_seen))
        heads = self.heads(hidden_states, position_embeddings)
        with torch.autocast(hidden_states.device.type, enabled=False):
            out = self._attend(heads, segments, cache, n_token)
        joined = rearrange(out, "b h t v -> b t (h v)").to(hidden_states.dtype)
        projected = getattr(self, FAMILIES[self.family].output)(joined)
        return getattr(self, "resid_dropout", nn.Identity())(projected), None

    def _attend(
        self, heads: _Heads, segments: Segments, cache: Cache | None, n_token: int
    ) -> Float[Tensor, "B H T V"]:
        config = self.config_of_patch
        query, key, value = (_packed(x, segments) for x in heads)
        layer = None if cache is None else _layer_of(cache, self.layer_idx)
        state = None if layer is None else layer.state
        if state is None:
            n_entry = 0 if config.mixer == "window" else config.n_entry
            state = empty_state(key, value, n_entry, config.n_recent)
        out, state = dictionary_attention(
            query, key, value, state, segments.lengths, scale=self.scaling, chunk=config.chunk,
            growth=config.growth, codes=self._codes(key, segments),
            reach=config.window if config.mixer == "window" else None,
        )  # fmt: skip
        if layer is not None:
            layer.take(state, n_token)
        return segments.unpack(out.transpose(1, 2)).transpose(1, 2)

    def _codes(self, key: Tensor, segments: Segments) -> Tensor | None:
        if self.config_of_patch.mixer != "vq":
            return None
        codes = self.codebook.codes()
        if self.training:
            wide = key.to(codes.dtype)
            valid = segments.valid(key.shape[2], key.device)
            found = self.codebook(wide, codes, valid)
            self.seen, self.commitment = found.stats, found.commitment
        return codes


def _packed(x: Float[Tensor, "B A T W"], segments: Segments) -> Float[Tensor, "B A T W"]:
    return segments.pack(x.transpose(1, 2)).transpose(1, 2)


def real_tokens(mask: Any, n_token: int, n_seen: int = 0) -> Bool[Tensor, "B T"] | None:
    """Which of the new tokens are real, by the mask that a model of transformers hands down.

    Args:
        mask: None, [B, all columns so far], or [B, 1, T, all columns], of bool or to be added; with
            a ``StaticCache`` columns of what is still to come are behind them.
        n_seen: columns before those of the new tokens, if there are as many.

    Raises:
        ValueError: a mask of another kind, or one that hides more than padding and the future.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(
            f"a patched layer got a mask of type {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    begin = min(n_seen, mask.shape[-1] - n_token)
    new = slice(begin, begin + n_token)
    if mask.ndim == 2:
        real = mask[:, new].bool()
    else:
        shown = mask[:, 0, :, new]
        shown = shown if shown.dtype == torch.bool else shown == 0
        real = shown.diagonal(dim1=1, dim2=2)
        causal = torch.ones(n_token, n_token, dtype=torch.bool, device=mask.device).tril()
        if not torch.equal(shown & real[..., None], causal & real[:, None] & real[..., None]):
            raise ValueError(
                "a patched layer sees all earlier tokens of a row, but the mask hides some of them "
                "(packed sequences, or a window of the model's own); give one text a row"
            )
    return None if bool(real.all()) else real


def _n_seen(cache: Cache, index: int) -> int:
    """Columns that the state in ``cache`` has read; 0 if it has none yet."""
    found: Any = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(found, StateLayer):
        return found.n_token
    if found is not None and found.get_seq_length():
        raise ValueError(
            f"layer {index} of the cache was filled by an unpatched model; start from an empty "
            "cache"
        )
    return 0


def _layer_of(cache: Cache, index: int) -> StateLayer[DictionaryState]:
    """The state's place in ``cache``, in place of the keys that the unpatched layer would keep."""
    found: Any = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(found, StateLayer):
        return found
    made: StateLayer[DictionaryState] = StateLayer()
    if found is not None:
        cache.layers[index] = made
    elif index == len(cache.layers):
        cache.layers.append(made)
    else:
        raise ValueError(f"a {type(cache).__name__} has no layer {index}; use a DynamicCache")
    return made


def _family_of(module: nn.Module) -> str:
    parts = {name for name, _ in module.named_children()}
    own = [name for name, _ in module.named_parameters(recurse=False)]
    for name, family in FAMILIES.items():
        if family.projections <= parts <= family.projections | family.optional and not own:
            _require_plain(module)
            return name
    raise ValueError(
        f"don't know how to patch {type(module).__name__} with the parts {sorted(parts) + own}; "
        "known are Llama-, Qwen- and GPT-2-style attention"
    )


def _require_plain(module: Any) -> None:
    """Nothing, if scores are products of queries and keys, and all earlier tokens are seen."""
    config, index = getattr(module, "config", None), module.layer_idx
    kinds = getattr(config, "layer_types", None)
    window = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window") and (not kinds or "sliding" in kinds[index]):
        window = getattr(config, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"layer {index} has a window of its own ({window}), so its state is constant already; "
            "leave it out of layers, or set config.sliding_window to None before the model is made"
        )
    for name in ("attn_logit_softcapping", "clip_qkv"):
        value = getattr(module, name, getattr(config, name, None))
        if value is not None:
            raise ValueError(f"layer {index} has {name}={value}, which patch can't keep")


def _n_groups(module: nn.Module, head_dim: int) -> int:
    """Key-value heads."""
    facts: Any = module
    if hasattr(facts, "k_proj"):
        return int(facts.k_proj.out_features) // head_dim
    return int(facts.num_heads)


def patch(
    model: nn.Module,
    mixer: str = "ovq",
    layers: Sequence[int] | None = None,
    **settings: Any,
) -> nn.Module:
    """Replaces the attention of ``model`` in place, and returns it; the weights stay.

    Args:
        mixer: "ovq", "vq" or "window".
        layers: which, counted from 0; None: all.
        settings: other fields of ``PatchConfig``.

    Raises:
        ValueError: an unknown model, setting or layer, or layers that give other outputs when they
            are patched and see every token; nothing is changed then.
    """
    for name in settings:
        require_known("setting", name, [field.name for field in dataclasses.fields(PatchConfig)])
    config = PatchConfig(mixer=mixer, **settings)
    modules = attention_modules(model)
    chosen = range(len(modules)) if layers is None else layers
    if wrong := [i for i in chosen if not 0 <= i < len(modules)]:
        raise ValueError(f"no layer {wrong[0]}: the model has layers 0 to {len(modules) - 1}")
    places = [modules[i] for i in chosen]
    made = []
    for parent, name in places:
        original = getattr(parent, name)
        if isinstance(original, PatchedAttention):
            raise ValueError("a layer is patched already; patch a fresh copy of the model")
        made.append(PatchedAttention(original, config).train(original.training))
    exact = PatchConfig(mixer="window", window=N_TRIED, chunk=N_TRIED)
    originals = [getattr(parent, name) for parent, name in places]
    require_same(model, originals, lambda layer: PatchedAttention(layer, exact))
    for (parent, name), patched in zip(places, made, strict=True):
        setattr(parent, name, patched)
    return model


def patched_layers(model: nn.Module) -> list[PatchedAttention]:
    """All patched layers, in order."""
    return [module for module in model.modules() if isinstance(module, PatchedAttention)]
