"""Mixers of transformers behind vqlm's interface: Gated DeltaNet and Mamba-2, to compare with.

Both write every token into one matrix a head, [K, V], which forgets at a rate of the token's own.
Gated DeltaNet (Yang et al. 2024) first takes out what the matrix holds under the token's key,

    S <- a S + b k (v - a S' k)'  ,   o = S' q ,

Mamba-2 (Dao and Gu 2024) adds, with a and b of one step width, S <- a S + b k v' and
o = S' q + D v.  What computes them is the module of transformers, on its path in plain torch where
there is no kernel.  Sizes keep the proportions of their papers: Gated DeltaNet has 3/4 of the
heads, with values twice as wide; Mamba-2 has twice the heads, all with one key and one query of
width 2 K.

A document that begins, and a row that ends, cut the call in pieces: exact, and one pass over the
module for each; a batch of many short documents is slow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from vqlm.config import LMConfig
from vqlm.flops import CHUNK, CONV_WIDTH
from vqlm.segments import Segments

STEP_LEAST, STEP_MOST = 1e-3, 0.1
"""Range of the step widths at first, in logarithm even: as in both papers' own code, and not as in
transformers' Qwen3-Next, whose layers begin with next to no memory."""


class RecurrentState(NamedTuple):
    """All that such a mixer remembers of a stream, however long."""

    conv: Float[Tensor, "B channels past"]
    """Last inputs of its short convolution, the newest last."""
    memory: Float[Tensor, "B H K V"]
    """The matrix of each head; Mamba-2 keeps it transposed."""
    length: Int[Tensor, " B"]
    """Tokens of the current document seen so far."""


class _Cache:
    """What transformers' modules take for a cache, of one layer; no tensor is changed in place."""

    def __init__(self, conv: Tensor, memory: Tensor) -> None:
        self.conv, self.memory = conv, memory

    def get_conv_state(self, layer_idx: int, state_idx: int) -> Tensor:
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int) -> Tensor:
        return self.memory

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # or a single token's inputs would be copied into the state

    def update_conv_state(self, inputs: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        """All inputs [B, channels, T] that count, after which ``conv`` has the last ones."""
        joined = torch.cat([self.conv.to(inputs.dtype), inputs], -1)
        # Copies, here and below: a state must not keep a whole call's tensors alive.
        self.conv = joined[..., 1 - conv_kernel_size :].to(self.conv.dtype, copy=True)
        return joined

    def update_recurrent_state(self, memory: Tensor, layer_idx: int) -> None:
        self.memory = memory.to(self.memory.dtype, copy=True)


class _InFloat64(TorchFunctionMode):
    """Leaves float64 as it is where transformers would narrow it to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrows = func is Tensor.float or (
            func is Tensor.to and any(x is torch.float32 for x in args[1:])
        )
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


class RecurrentMixer(nn.Module):
    """A module of transformers as ``y, state, aux = mixer(x, state)``; aux is None."""

    name: str
    module: Any

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        try:
            self.module = self.build()
        except ModuleNotFoundError as error:
            raise ImportError(
                f"mixer {self.name!r} needs {error.name}: pip install 'vqlm[hf]'", name=error.name
            ) from error
        with torch.no_grad():
            share = torch.rand_like(self.module.dt_bias)
            step = STEP_LEAST * (STEP_MOST / STEP_LEAST) ** share
            # It is a softplus of this that is the step.
            self.module.dt_bias.copy_(step + (-torch.expm1(-step)).log())

    def build(self) -> Any:
        """The module, for the sizes of ``config``; this class raises NotImplementedError."""
        raise NotImplementedError

    def memory_shape(self) -> tuple[int, int, int]:
        """Heads and the two sides of a head's matrix; this class raises NotImplementedError."""
        raise NotImplementedError

    def init_state(self, batch_size: int) -> RecurrentState:
        """The empty state of ``batch_size`` rows, in at least float32."""
        like = self.module.dt_bias
        dtype = torch.promote_types(like.dtype, torch.float32)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=like.device)

        n_channel = self.module.conv1d.in_channels
        return RecurrentState(
            zeros(n_channel, CONV_WIDTH - 1), zeros(*self.memory_shape()), zeros().long()
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: RecurrentState | None = None,
        segments: Segments = Segments(),  # noqa: B008  (immutable)
        with_stats: bool | None = None,
        seed: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RecurrentState, None]:
        """Any number of tokens, after those that ``state`` has seen; T = 1 decodes.

        ``with_stats`` and ``seed`` are for other mixers: there is no codebook and no sinusoid.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        length = segments.advance(state.length, x.shape[1])
        if segments.plain:
            y, conv, memory = self._read(x, state.conv, state.memory)
        else:
            y, conv, memory = self._read_pieces(x, state.conv, state.memory, segments)
        return y, RecurrentState(conv, memory, length), None

    def _read_pieces(
        self, x: Tensor, conv: Tensor, memory: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Between two bounds no document begins and no row ends; outputs at padding are zeros."""
        n_row, n_token = x.shape[:2]
        starts = segments.starts
        lengths = segments.n_real(x.new_full((n_row,), 0).long(), n_token)
        bounds = {0, n_token, *lengths.tolist()}
        if starts is not None:
            bounds |= set(starts.any(0).nonzero()[:, 0].tolist())
        outputs = []
        for begin, end in pairwise(sorted(bounds)):
            if starts is not None:
                fresh = starts[:, begin]
                conv = conv.masked_fill(fresh[:, None, None], 0)
                memory = memory.masked_fill(fresh[:, None, None, None], 0)
            part = x[:, begin:end]
            rows = (lengths > begin).nonzero()[:, 0]
            if len(rows) == n_row:
                y, conv, memory = self._read(part, conv, memory)
            else:
                y = part.new_zeros(part.shape)
                if len(rows):
                    own, *after = self._read(part[rows], conv[rows], memory[rows])
                    y = y.to(own.dtype).index_copy(0, rows, own)
                    conv = conv.index_copy(0, rows, after[0])
                    memory = memory.index_copy(0, rows, after[1])
            outputs.append(y)
        return torch.cat(outputs, 1), conv, memory

    def _read(self, x: Tensor, conv: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = x.shape[1] == 1  # Mamba-2's path for one token writes into the memory it is given
        cache = _Cache(conv, memory.clone() if one else memory)
        keeps: AbstractContextManager[Any] = nullcontext()
        if one and torch.is_grad_enabled():
            keeps = saved_tensors_hooks(torch.clone, lambda saved: saved)
        wide = _InFloat64() if memory.dtype == torch.float64 else nullcontext()
        with keeps, wide:
            y = self.module(x, cache=cache)
        return y, cache.conv, cache.memory


class GatedDeltaNet(RecurrentMixer):
    """The mixer of Qwen3-Next; 3/4 of ``n_head`` heads, keys of ``d_k``, values of 2 ``d_v``."""

    name = "gated-deltanet"

    def memory_shape(self) -> tuple[int, int, int]:
        """Heads, K, V."""
        return self.config.deltanet_shape()

    def build(self) -> Any:
        """As ``RecurrentMixer.build``."""
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        heads, key, value = self.memory_shape()
        return Qwen3NextGatedDeltaNet(
            Qwen3NextConfig(
                hidden_size=self.config.d_model, num_hidden_layers=1,
                layer_types=["linear_attention"], linear_num_key_heads=heads,
                linear_num_value_heads=heads, linear_key_head_dim=key,
                linear_value_head_dim=value, linear_conv_kernel_dim=CONV_WIDTH,
            ),
            layer_idx=0,
        )  # fmt: skip


class Mamba2(RecurrentMixer):
    """The mixer of Mamba-2: 2 ``n_head`` heads of width ``d_v``, a state of 2 ``d_k`` for each."""

    name = "mamba2"

    def memory_shape(self) -> tuple[int, int, int]:
        """Heads, V, K."""
        return self.config.mamba_shape()

    def build(self) -> Any:
        """As ``RecurrentMixer.build``."""
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        heads, value, key = self.memory_shape()
        inner, width = heads * value, self.config.d_model
        module = Mamba2Mixer(
            Mamba2Config(
                hidden_size=inner, expand=1, num_hidden_layers=1, num_heads=heads, head_dim=value,
                state_size=key, n_groups=1, chunk_size=CHUNK, conv_kernel=CONV_WIDTH,
            ),
            layer_idx=0,
        )  # fmt: skip
        # Its config has inner widths that are multiples of the outer one alone.
        module.in_proj = nn.Linear(width, module.in_proj.out_features, bias=False)
        module.out_proj = nn.Linear(inner, width, bias=False)
        return module
