"""What a call of the language model takes and gives: its state, its logits or its loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqlm.codebook import CodeStats
from vqlm.fused import at_least_float32
from vqlm.ovq import OVQState
from vqlm.recurrent import RecurrentState
from vqlm.softmax import SoftmaxState
from vqlm.vq import VQAux, VQState

MixerState = VQState | SoftmaxState | OVQState | RecurrentState


class LMState(NamedTuple):
    """All that the model remembers of a stream."""

    layers: tuple[MixerState, ...]
    """One state a layer."""
    length: Int[Tensor, " B"]
    """Tokens of the current document seen so far."""
    recent: tuple[Float[Tensor, "B past D"], ...] = ()
    """Of each layer that has any: the last inputs of its short convolution, and the last input of
    its mixer if keys are shifted."""

    def detach(self) -> LMState:
        """The same values with gradients cut, for truncated back-propagation through time."""
        layers = tuple(type(s)(*(x.detach() for x in s)) for s in self.layers)
        return LMState(layers, self.length, tuple(x.detach() for x in self.recent))

    def tensors(self) -> list[Tensor]:
        """All tensors of the state, in a fixed order."""
        return [x for state in self.layers for x in state] + [self.length, *self.recent]

    def replace_tensors(self, tensors: list[Tensor]) -> LMState:
        """A state of this shape holding ``tensors``, in the order of ``tensors()``."""
        rest = iter(tensors)
        layers = tuple(type(state)(*(next(rest) for _ in state)) for state in self.layers)
        return LMState(layers, next(rest), tuple(rest))

    def bytes(self) -> int:
        """Size in bytes."""
        return sum(x.numel() * x.element_size() for x in self.tensors())


class Objective(NamedTuple):
    """A training loss and its main part."""

    loss: Float[Tensor, ""]
    """To be minimised, per token."""
    nats: Float[Tensor, ""]
    """Sum of the cross-entropy over the counted tokens; no gradient."""


class LMOutput(NamedTuple):
    """What one call returns."""

    logits: Float[Tensor, "B T N"]
    """Unnormalised log-probabilities of the next token; zeros at padding."""
    state: LMState
    """State after the call."""
    aux: tuple[VQAux | None, ...]
    """One a layer; None for mixers without a codebook."""

    def commitment(self) -> Float[Tensor, ""]:
        """Sum over layers, heads and tokens of |k - k_hat|^2; 0 without codebooks."""
        return _commitment(self.aux, self.logits)

    def objective(
        self,
        targets: Int[Tensor, "B T"],
        commitment: float,
        counted: Bool[Tensor, "B T"] | None = None,
        n_token: int | None = None,
    ) -> Objective:
        """What a training minimises: (cross-entropy + ``commitment`` |k - k_hat|^2) / ``n_token``.

        Sums over the tokens of this call that are ``counted`` (None: all), divided by ``n_token``;
        None: by all B T of this call, counted or not, as the official implementation does.
        The commitment term counts the tokens that were ``learned`` in ``LM.forward``.
        """
        logits = at_least_float32(self.logits)
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nats = (each if counted is None else each * counted.flatten()).sum()
        return Scored(nats, self.state, self.aux).objective(commitment, n_token or targets.numel())

    def stats(self) -> tuple[CodeStats | None, ...]:
        """Codebook statistics, one a layer; None where there is no codebook or none asked for."""
        return _stats(self.aux)


class Scored(NamedTuple):
    """What a call returns that was given ``targets``: their cross-entropy in place of logits."""

    nats: Float[Tensor, ""]
    """Sum of the cross-entropy over the targets that count."""
    state: LMState
    """State after the call."""
    aux: tuple[VQAux | None, ...]
    """One a layer; None for mixers without a codebook."""

    def objective(self, commitment: float, n_token: int) -> Objective:
        """As ``LMOutput.objective``, over the targets of the call."""
        loss = (self.nats + commitment * _commitment(self.aux, self.nats)) / n_token
        return Objective(loss, self.nats.detach())

    def stats(self) -> tuple[CodeStats | None, ...]:
        """As ``LMOutput.stats``."""
        return _stats(self.aux)


def _stats(auxes: tuple[VQAux | None, ...]) -> tuple[CodeStats | None, ...]:
    return tuple(None if aux is None else aux.stats for aux in auxes)


def _commitment(auxes: tuple[VQAux | None, ...], like: Tensor) -> Tensor:
    terms = [aux.commitment for aux in auxes if aux is not None]
    return torch.stack(terms).sum() if terms else like.new_zeros(())
