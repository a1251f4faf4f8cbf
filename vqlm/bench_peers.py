"""Models that vqlm's are measured against: what a user would otherwise pick, with equal parameters.

``sdpa`` is vqlm's own model with torch's causal attention and no positions, so that everything
around the attention is the same; ``llama``, ``gated-deltanet`` and ``mamba2`` are those of
transformers, the last two on their paths in plain torch, as there is no other on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vqlm.config import LMConfig
from vqlm.layers import AttentionProjections
from vqlm.model import LM, Layer
from vqlm.segments import Segments
from vqlm.softmax import SoftmaxState

OURS = ("vq", "ovq", "window", "softmax", "sdpa")
"""Models that are an ``LM``: by the name of its mixer."""


class SDPAAttention(nn.Module):
    """torch's causal attention with the projections and interface of ``SoftmaxAttention``.

    What it gives is that of a "softmax" mixer without positions.  Documents and padding it doesn't
    know, and after the first call it takes one token at a time.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.project = AttentionProjections(dataclasses.replace(config, positions="rotary"))

    def init_state(self, batch_size: int) -> SoftmaxState:
        """The empty state of ``batch_size`` rows."""
        config, like = self.config, self.project.content_bias
        return SoftmaxState(
            like.new_zeros(batch_size, config.kv_heads, 0, config.d_k),
            like.new_zeros(batch_size, config.kv_heads, 0, config.d_v),
            torch.zeros(batch_size, dtype=torch.long, device=like.device),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: SoftmaxState | None = None,
        segments: Segments = Segments(),  # noqa: B008  (immutable)
        with_stats: bool | None = None,
        seed: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], SoftmaxState, None]:
        """As ``SoftmaxAttention.forward``.

        Raises:
            ValueError: documents, padding, or several tokens after others.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        n_old, n_token = state.key.shape[2], x.shape[1]
        if segments.starts is not None or segments.lengths is not None or (n_old and n_token > 1):
            raise ValueError(
                f"SDPAAttention: got {n_token} tokens after {n_old}; it takes whole sequences "
                "from the empty state, or one token, without documents and padding"
            )
        query, key, value, gate = self.project(x)
        query = query + self.project.bias().content[:, None]
        key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
        heads = causal(query, key, value, is_causal=n_old == 0)
        state = SoftmaxState(key, value, state.length + n_token)
        return self.project.merge(heads, gate), state, None


def causal(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G P K"],
    value: Float[Tensor, "B G P V"],
    is_causal: bool = True,
) -> Float[Tensor, "B H T V"]:
    """torch's attention.  Its flash kernel wants values as wide as keys: those of the paper's head
    are cut in parts of that width, each with the same weights, which is the fastest way there."""
    grouped, width = key.shape[1] != query.shape[1], query.shape[-1]
    if value.shape[-1] == width or value.shape[-1] % width or query.shape[1] != 1:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=1.0, enable_gqa=grouped
        )
    parts = value.shape[-1] // width
    values = value.unflatten(-1, (parts, width)).squeeze(1).transpose(1, 2)
    query, key = (x.expand(-1, parts, -1, -1) for x in (query, key))
    out = F.scaled_dot_product_attention(query, key, values, is_causal=is_causal, scale=1.0)
    return out.transpose(1, 2).flatten(2)[:, None]


def own_model(name: str, config: LMConfig, seed: int = 0) -> LM:
    """A model with the mixer ``name`` of ``OURS`` in every layer."""
    torch.manual_seed(seed)
    if name != "sdpa":
        return LM(dataclasses.replace(config, mixers=(name,)))
    lm = LM(dataclasses.replace(config, mixers=("softmax",), positions="rotary"))
    for layer in lm.layers:
        assert isinstance(layer, Layer)
        mixer = SDPAAttention(config)
        mixer.load_state_dict(layer.mixer.state_dict())
        layer.mixer = mixer  # type: ignore[assignment]
    return lm


def n_parameter(model: nn.Module) -> int:
    """Learned numbers."""
    return sum(p.numel() for p in model.parameters())


def _llama(config: LMConfig, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = config.n_head if config.n_head > 1 else max(1, config.d_model // 64)
    groups = config.kv_heads if config.n_head > 1 else heads
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=width,
            num_hidden_layers=config.n_layer, num_attention_heads=heads,
            num_key_value_heads=groups, head_dim=config.d_model // heads,
            max_position_embeddings=2**20, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _gated_deltanet(config: LMConfig, width: int) -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    heads = config.n_head if config.n_head > 1 else max(1, config.d_model // 64)
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=width,
            num_hidden_layers=config.n_layer, num_attention_heads=heads, num_experts=0,
            layer_types=["linear_attention"] * config.n_layer,
            linear_num_key_heads=heads, linear_num_value_heads=heads,
            linear_key_head_dim=config.d_model // heads,
            linear_value_head_dim=config.d_model // heads,
        )
    )  # fmt: skip


def _mamba2(config: LMConfig, n_layer: int) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    # A chunk of 64 is what its torch path needs least memory with at these widths.
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=n_layer,
            head_dim=64, num_heads=2 * config.d_model // 64, n_groups=1, chunk_size=64,
            pad_token_id=0, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


HF: dict[str, Callable[[LMConfig, int], Any]] = {
    "llama": _llama,
    "gated-deltanet": _gated_deltanet,
    "mamba2": _mamba2,
}
"""Models of transformers, of a width of the SwiGLU, or, for Mamba-2, a number of layers."""

NAMES = (*OURS, *HF)


def hf_model(name: str, config: LMConfig, seed: int = 0) -> Any:
    """The model ``name`` of ``HF`` with the parameters of vqlm's "vq" model of ``config``, as near
    as its width or, for Mamba-2, its number of layers comes to that.

    Raises:
        ValueError: it can't be that small.
    """
    with torch.device("meta"):
        target = n_parameter(own_model("vq", config))
        one, two = (n_parameter(HF[name](config, n)) for n in (1, 2))
    size = 1 + round((target - one) / (two - one))
    if size < 1:
        raise ValueError(
            f"bench: {name} has at least {one:,} parameters at d_model={config.d_model}, "
            f"n_layer={config.n_layer}, vqlm's model {target:,}; choose a larger one"
        )
    torch.manual_seed(seed)
    model = HF[name](config, size)
    # Every model loads with weights of some 16-bit type sooner or later; not here.
    return model.float()
