"""The decoder-only language model: embedding, layers of one mixer each, logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqlm.codebook import Codebook, CodeStats
from vqlm.config import LMConfig
from vqlm.flops import model_flops
from vqlm.fused import normalised
from vqlm.kept import evaluating, frozen
from vqlm.layers import Before, Norm, Projected, ShortConvolution, SwiGLU, drop, sinusoid
from vqlm.loss import IGNORED, summed_cross_entropy
from vqlm.outputs import LMOutput, LMState, MixerState, Objective, Scored
from vqlm.ovq import OVQAttention
from vqlm.recurrent import GatedDeltaNet, Mamba2, RecurrentMixer
from vqlm.sampling import pick
from vqlm.segments import Segments, last_slots
from vqlm.sequence_parallel import Cut, require_cuttable
from vqlm.softmax import SoftmaxAttention, WindowAttention
from vqlm.stretches import in_stretches, require_stretch
from vqlm.vq import VQAttention, VQAux

__all__ = ["LM", "MIXERS", "LMOutput", "LMState", "Layer", "MixerState", "Objective", "Scored"]

Mixer = VQAttention | SoftmaxAttention | OVQAttention | RecurrentMixer

MIXERS: dict[str, type[Mixer]] = {
    "vq": VQAttention,
    "softmax": SoftmaxAttention,
    "window": WindowAttention,
    "ovq": OVQAttention,
    "gated-deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}

SEEDS_PER_LAYER = 3
"""Dropout masks that a layer draws from seeds: sinusoids, its mixer, its SwiGLU."""


class Layer(nn.Module):
    """Pre-norm residual layer: a mixer, then (``layer="swiglu"``) a SwiGLU."""

    def __init__(self, config: LMConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.mixer_norm = Norm(config.d_model)
        self.mixer = MIXERS[config.mixer_of(index)](config)
        self.has_conv = config.conv_width > 1
        if self.has_conv:
            self.conv = ShortConvolution(config.d_model, config.conv_width)
        self.shifts_keys = config.shifts_keys(index)
        self.n_recent = config.conv_width - 1 + self.shifts_keys
        """Tokens whose input the layer remembers, besides its mixer's state."""
        self.has_ff = config.layer == "swiglu"
        if self.has_ff:
            self.ff_norm = Norm(config.d_model)
            self.ff = SwiGLU(config.d_model, config.ff_width)

    def forward(
        self, x: Tensor, state: MixerState, segments: Segments, with_stats: bool | None,
        seed: int | None, recent: Tensor | None = None,
    ) -> tuple[Tensor, MixerState, VQAux | None, Tensor | None]:  # fmt: skip
        """Adds the sublayers to the stream ``x`` [B, T, D]; ``seed`` as in ``LM.forward``.

        ``recent``: the ``n_recent`` inputs before the call; those after it come last."""
        seeds: list[int | None] = [None] * SEEDS_PER_LAYER
        if seed is not None:
            seeds = [SEEDS_PER_LAYER * seed + i for i in range(SEEDS_PER_LAYER)]
        mixed, before = self.mixer_norm(x), list[Before]()
        if recent is not None:
            mixed, recent, before = self._after_recent(mixed, recent, state.length, segments)
        y, state, aux = self.mixer(mixed, state, segments, with_stats, seeds[0], *before)
        x = x + self._drop(y, seeds[1])
        if self.has_ff:
            x = x + self._drop(self.ff(self.ff_norm(x)), seeds[2])
        return x, state, aux, recent

    def _after_recent(
        self, x: Tensor, recent: Tensor, length: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor, list[Before]]:
        """The mixer's input [B, T, D], convolved; what is recent then; the token before the call,
        if keys are shifted."""
        cut, n_token = segments.cut, x.shape[1]
        position = segments.positions(length, n_token)
        inputs, last = recent.split([self.n_recent - self.shifts_keys, int(self.shifts_keys)], 1)
        if self.has_conv:
            inputs = inputs if cut is None else cut.newest_before(x, inputs, 1)
            x, inputs = self.conv(x, inputs, position, segments.lengths)
        if not self.shifts_keys:
            return x, inputs, []
        last = last if cut is None else cut.newest_before(x, last, 1)
        newest = last_slots(torch.cat([last, x], 1), 1, n_token, segments.lengths, 1)
        return x, torch.cat([inputs, newest], 1), [Before(last, position == 0)]

    def _drop(self, y: Tensor, seed: int | None) -> Tensor:
        if not self.training:
            return y
        y = drop(y, self.config.dropout_residual)
        return y * drop(y.new_ones(y.shape[0], 1, 1), self.config.dropout_layer, seed)


class LM(nn.Module):
    """Decoder-only language model over token ids.

    ``out = LM(config)(tokens, state=None)`` gives ``out.logits`` [B, T, vocabulary],
    ``out.state`` and ``out.aux``.  Any way of cutting a stream into calls gives the same logits.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """Whether layers are recomputed in the backward pass instead of kept (training only)."""
        self.stretch: int | None = None
        """If they are: tokens of a stretch, all layers of which are computed again at once, from
        the state before it, so that memory doesn't grow with the length; None: each layer by
        itself, for the whole call."""
        self.cut: Cut | None = None
        """Which part of each sequence is here, if they are cut over processes (training only)."""
        self.unused_output_bias: Tensor | None = None
        """Kept by ``convert`` for the way back: the official model has it, and never uses it."""
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        if config.absolute_position:
            self.position_scale = nn.Parameter(torch.zeros(()))
        if config.final_norm:
            self.norm = Norm(config.d_model)
        if config.tie_embedding:
            self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.output = nn.Linear(config.d_model, config.vocab_size)
        self._initialize()

    def _initialize(self) -> None:
        """Official start: kernels normal with std 1/sqrt(fan-in), embedding std 1, biases 0.

        With a SwiGLU, what ends in the stream is also divided by sqrt(number of sublayers), as
        in GPT-2; the paper's model has no such factor.
        """
        n_sublayer = 2 * self.config.n_layer if self.config.layer == "swiglu" else 1
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.Linear):
                depth = n_sublayer if name.endswith((".output", ".out_proj")) else 1
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features * depth))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self._layers():
            if layer.shifts_keys:
                mixer: Any = layer.mixer
                (mixer if isinstance(mixer, OVQAttention) else mixer.project).begin_as_cache_()

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compiles (``torch.compile``) each norm and SwiGLU as one graph, without a break.

        Attention has kernels of its own, and is left alone.  Compiling takes place in the first
        call, some tens of seconds on a CPU, and again for a new shape.
        """
        for module in self.modules():
            if isinstance(module, Norm | SwiGLU):
                module.compile(fullgraph=True, backend=backend)

    def init_state(self, batch_size: int) -> LMState:
        """The empty state of ``batch_size`` rows."""
        layers = tuple(layer.mixer.init_state(batch_size) for layer in self._layers())
        device = self.embedding.weight.device
        length = torch.zeros(batch_size, dtype=torch.long, device=device)
        dtype, width = self.embedding.weight.dtype, self.config.d_model
        recent = tuple(
            torch.zeros(batch_size, layer.n_recent, width, dtype=dtype, device=device)
            for layer in self._layers()
            if layer.n_recent
        )
        return LMState(layers, length, recent)

    def with_entries(self, n_entry: int) -> LM:
        """A model with the same parameters whose "ovq" dictionaries have ``n_entry`` entries N.

        N is no part of what is learned, so a sequence may be read with another one; a state goes on
        with the N that it began with.
        """
        config = dataclasses.replace(self.config, n_entry=n_entry)
        with torch.device("meta"):
            other = type(self)(config)
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        other.checkpointing, other.stretch, other.cut = self.checkpointing, self.stretch, self.cut
        return other.train(self.training)

    def flops(self, seq_len: int) -> int:
        """Floating-point operations of a forward pass over one row of ``seq_len`` tokens from the
        empty state; a training step has three times as many.  ``vqlm.flops`` says what counts."""
        return model_flops(self.config, seq_len)

    def state_bytes(self, batch_size: int = 1) -> int:
        """Bytes of the empty state; for "vq" and "window" mixers also after any length."""
        return self.init_state(batch_size).bytes()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: LMState | None = None,
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        starts: Bool[Tensor, "B T"] | None = None,
        learned: Bool[Tensor, "B T"] | None = None,
        with_stats: bool | None = None,
        dropout_seed: int | None = None,
        targets: Int[Tensor, "B T"] | None = None,
    ) -> LMOutput | Scored:
        """Logits of the token after each of ``tokens``, given all before it in its document.

        Args:
            tokens: ids, T at least 1.
            state: what came before; None for nothing.  It is not changed.
            mask: True at real tokens, in any pattern; padding leaves no trace in the state.
            starts: True at the first token of a document; nothing before it is attended to.
            learned: True at tokens whose keys count for commitment loss and codebook statistics;
                None: all real ones.  Others are read and remembered all the same.
            with_stats: gather codebook statistics; None: in training mode only.
            dropout_seed: decides which layers and sinusoids are dropped, so that all calls over
                one long sequence can drop the same ones, as in the paper; None: drawn anew.
            targets: the tokens after each of ``tokens``, ``loss.IGNORED`` where they don't count
                (nor do they at padding): gives ``Scored``, the loss in little memory.

        Raises:
            ValueError: no tokens, another batch size in the state, or a cut or stretch that
                cannot be.
        """
        state = self._checked_state(tokens, state)
        recompute = self.checkpointing and self.training
        by_token: dict[str, Any] = {
            "tokens": tokens, "mask": mask, "starts": starts, "learned": learned,
            "targets": targets,
        }  # fmt: skip
        if self.stretch is None or not recompute:
            return self._read(
                state, with_stats=with_stats, seed=dropout_seed, recompute=recompute, **by_token
            )
        require_stretch(self.config, self.stretch, self.cut is not None)
        if dropout_seed is None:  # what is dropped is the same in all stretches
            dropout_seed = int(torch.randint(2**31, ()))
        return in_stretches(
            self._read, self.stretch, state, by_token,
            with_stats=with_stats, seed=dropout_seed, recompute=False,
        )  # fmt: skip

    def _read(
        self, state: LMState, tokens: Tensor, mask: Tensor | None, starts: Tensor | None,
        learned: Tensor | None, targets: Tensor | None, *, with_stats: bool | None,
        seed: int | None, recompute: bool,
    ) -> LMOutput | Scored:  # fmt: skip
        """``forward``, whose ``dropout_seed`` is ``seed``, in one piece."""
        segments = Segments.of(mask, starts, learned)
        cut = self.cut if self.training else None
        if cut is not None:
            require_cuttable(self.config, tokens.shape[1], mask is None)
            length = segments.length_before(cut, state.length, tokens.shape[1])
            layers = tuple(layer._replace(length=length) for layer in state.layers)
            state, segments = LMState(layers, length, state.recent), segments._replace(cut=cut)
        tokens = segments.pack(tokens)
        x = self._embed(tokens, segments.positions(state.length, tokens.shape[1]))
        states, auxes, recent, old = [], [], [], iter(state.recent)
        for index, layer in enumerate(self._layers()):
            own_seed = None if seed is None else seed * len(self.layers) + index
            past = next(old) if layer.n_recent else None
            arguments = (x, state.layers[index], segments, with_stats, own_seed, past)
            if recompute:
                x, new, aux, past = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, new, aux, past = layer(*arguments)
            states.append(new)
            auxes.append(aux)
            recent += [past] if layer.n_recent else []
        length = segments.advance(state.length, tokens.shape[1])
        after = LMState(tuple(states), length, tuple(recent))
        if cut is not None:
            after = after.replace_tensors(cut.of_last(after.tensors()))
        if targets is None:
            return LMOutput(segments.unpack(self._logits(x)), after, tuple(auxes))
        return Scored(self._nats(x, targets, segments), after, tuple(auxes))

    def _layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def _checked_state(self, tokens: Tensor, state: LMState | None) -> LMState:
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(
                f"LM: tokens have shape {tuple(tokens.shape)}; want [B, T], neither of them 0"
            )
        if state is None:
            return self.init_state(tokens.shape[0])
        if state.length.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"LM: the state has {state.length.shape[0]} rows, tokens have {tokens.shape[0]}; "
                f"use init_state({tokens.shape[0]}) or the state of the same rows"
            )
        return state

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.config.absolute_position:
            waves = sinusoid(positions, self.config.d_model, self.config.position_base, x.dtype)
            x = x + self.position_scale * waves
        return drop(x, self.config.dropout_embedding) if self.training else x

    def _head(self) -> tuple[Tensor, Tensor]:
        if self.config.tie_embedding:
            return self.embedding.weight, self.output_bias
        return self.output.weight, self.output.bias

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x) if self.config.final_norm else x
        logits = F.linear(x, *self._head())
        return logits * self.config.output_scale if self.config.output_scale != 1 else logits

    def _nats(self, x: Tensor, targets: Tensor, segments: Segments) -> Tensor:
        if segments.mask is not None:
            targets = segments.pack(targets.masked_fill(~segments.mask, IGNORED))
        x = self.norm(x) if self.config.final_norm else x
        x, scale = x.flatten(0, 1), self.config.output_scale
        return summed_cross_entropy(x, *self._head(), targets.flatten(), scale)

    def codebooks(self) -> list[Codebook | None]:
        """The codebook of each layer; None where the mixer has none."""
        mixers = [layer.mixer for layer in self._layers()]
        return [m.codebook if isinstance(m, VQAttention) else None for m in mixers]

    @torch.no_grad()
    def initialize_codebooks_(self, tokens: Int[Tensor, "B T"], seed: int, **context: Any) -> None:
        """Sets every codebook to k-means centroids of the keys that ``tokens`` produce.

        One forward pass, each codebook set as soon as the keys are known, before its layer reads
        it, so that deeper layers see the output of those before as it will be.
        ``context``: mask and starts, as in ``forward``.

        Raises:
            ValueError: fewer tokens than codes.
        """
        generator = torch.Generator().manual_seed(seed)
        valid = Segments.of(context.get("mask")).valid(tokens.shape[1], tokens.device)
        real = valid.expand(tokens.shape).flatten()

        def fit(book: Codebook, scale: float, projected: Projected) -> None:
            keys = normalised(projected.key, scale).transpose(0, 1).flatten(1, 2)
            book.initialize_(keys[:, real], generator)

        mixers = [layer.mixer for layer in self._layers()]
        hooks = [
            mixer.project.register_forward_hook(
                lambda _, __, out, m=mixer: fit(m.codebook, m.project.scale, out)
            )
            for mixer in mixers
            if isinstance(mixer, VQAttention)
        ]
        try:
            with evaluating(self):  # dropout would make the codes depend on more than the seed
                self(tokens, with_stats=False, **context)
        finally:
            for hook in hooks:
                hook.remove()

    def update_codebooks_(
        self,
        stats: tuple[CodeStats | None, ...],
        decay: float,
        revive_below: float = 0.0,
        revive_toward: float = 1.0,
    ) -> None:
        """Applies one step's merged statistics (``LMOutput.stats``); see ``Codebook.update_``."""
        for book, seen in zip(self.codebooks(), stats, strict=True):
            if book is not None and seen is not None:
                book.update_(seen, decay, revive_below, revive_toward)

    @torch.inference_mode()
    def stream(
        self,
        prompt: Int[Tensor, "B T"],
        n_token: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        state: LMState | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        forbidden: Bool[Tensor, " N"] | None = None,
    ) -> Iterator[tuple[Int[Tensor, " B"], LMState]]:
        """Yields ``n_token`` times the next token of each row, with the state before it.

        The prompt is read in one call, after ``state``; every further token costs the same.
        ``mask`` marks the real tokens of prompts of unequal length, in any pattern.
        ``forbidden`` marks tokens that are never drawn.

        Raises:
            ValueError: an empty prompt, or settings that ``sampling.pick`` refuses.
        """
        with evaluating(self):
            out = self(prompt, state, mask=mask)
        logits = out.logits[:, -1] if mask is None else _last_real(out.logits, mask)
        token = prompt[:, -1]
        with frozen(self):
            for index in range(n_token):
                if index > 0:
                    with evaluating(self):
                        out = self(token[:, None], out.state)
                    logits = out.logits[:, -1]
                if forbidden is not None:
                    logits = logits.masked_fill(forbidden, -torch.inf)
                token = pick(logits, temperature, top_p, generator)
                yield token, out.state

    def generate(
        self, prompt: Int[Tensor, "B T"], n_token: int, **settings: Any
    ) -> Int[Tensor, "B total"]:
        """The prompt with ``n_token`` tokens appended; ``settings`` as in ``stream``."""
        tokens = [token for token, _ in self.stream(prompt, n_token, **settings)]
        return torch.cat([prompt, *(token[:, None] for token in tokens)], 1)


def _last_real(logits: Float[Tensor, "B T N"], mask: Bool[Tensor, "B T"]) -> Tensor:
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, 0).amax(1)
    return logits[torch.arange(len(logits), device=mask.device), last]
