"""vqlm's states of constant size as caches of transformers.

A state is a value: whoever goes on from it makes a new one and leaves it as it is.  So a copy of a
cache shares its tensors, choosing rows makes new ones, and undoing calls (assisted generation) is
going on from an earlier state; what can't be had is a state cut anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from jaxtyping import Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from vqlm.model import LMState

S = TypeVar("S")


class StateLayer(CacheLayerMixin, Generic[S]):
    """One state, of anything that ``_mapped`` can walk, as what transformers calls a cache layer.

    Args:
        state: what has been read; None: nothing.
        n_token: columns read, padding included: where the next token of ``input_ids`` lies.
    """

    def __init__(self, state: S | None = None, n_token: int = 0) -> None:
        super().__init__()
        self.state = state
        self.n_token = n_token
        self.is_initialized = True

    def _mapped(self, state: S, change: Callable[[Tensor], Tensor]) -> S:
        """The state with every tensor changed; rows are the first axis of each."""
        assert isinstance(state, tuple)
        made: S = type(state)(*(change(x) for x in state))
        return made

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do, whatever the keys [B, H, T, K]: the first call brings the state."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: there are no keys and values [B, H, T, K] to append to.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"a {type(self).__name__} holds vqlm's state, which only vqlm can update")

    def take(self, state: S, n_token: int) -> None:
        """Takes the state after ``n_token`` more columns."""
        self.state = state
        self.n_token += n_token

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for 0 tokens.

        Raises:
            ValueError: a state of constant size can't be cut.
        """
        if tokens_to_remove:
            raise ValueError(
                f"crop({tokens_to_remove}): a state of constant size can't be cut; keep a "
                "copy.deepcopy of the cache instead"
            )

    def get_seq_length(self) -> int:
        """Columns read so far, padding included."""
        return self.n_token

    def get_max_length(self) -> int:
        """-1: there is no most."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What a mask over everything read would measure."""
        return self.n_token + query_length, 0

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.n_token = None, 0

    def offload(self) -> None:
        """Nothing: a few megabytes stay where they are."""

    def prefetch(self) -> None:
        """Nothing."""

    def reorder_cache(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after another."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices`` [rows]."""
        self._rows(lambda x: x[indices.to(x.device)])

    def _rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self._mapped(self.state, choose)

    def __deepcopy__(self, memo: dict[int, Any]) -> StateLayer[S]:
        """A cache that goes its own way; states are never changed, so they can be shared."""
        twin = type(self)(self.state, self.n_token)
        twin.__dict__.update(self.__dict__)
        return twin


class Call(NamedTuple):
    """A call that a cache may have to undo in part."""

    before: LMState | None
    n_token: int
    read: Callable[[LMState | None, int], LMState]
    """The state after only the first so many tokens of it."""


class VqlmLayer(StateLayer[LMState]):
    """A whole model's state; calls can be undone while they are recorded."""

    def __init__(self, state: LMState | None = None, n_token: int = 0) -> None:
        super().__init__(state, n_token)
        self.record_past = False
        self._calls: tuple[Call, ...] = ()

    def _mapped(self, state: LMState, change: Callable[[Tensor], Tensor]) -> LMState:
        self._calls = ()  # they were of other rows
        return state.replace_tensors([change(x) for x in state.tensors()])

    def advance(self, state: LMState, call: Call) -> None:
        """Takes the state after a call."""
        if self.record_past:
            self._calls += (call,)
        self.take(state, call.n_token)

    def activate_past_recording(self) -> None:
        """From now on calls can be undone, until the next ``crop``."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether ``crop`` works: if calls are being recorded."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Undoes the last ``-tokens_to_remove`` tokens, by reading what is left of their call.

        Raises:
            ValueError: a positive number, or tokens read before the recording began: a constant
                state can't be cut.
        """
        left = -tokens_to_remove
        if left < 0 or left > sum(call.n_token for call in self._calls):
            raise ValueError(
                f"crop({tokens_to_remove}): only tokens read since activate_past_recording() and "
                "the last crop can be taken back, as a negative number; a state of constant size "
                "can't be cut. Keep a copy.deepcopy of the cache instead"
            )
        calls = list(self._calls)
        while left > 0:
            call = calls.pop()
            kept = max(0, call.n_token - left)
            self.state = call.before if kept == 0 else call.read(call.before, kept)
            self.n_token -= call.n_token - kept
            left -= call.n_token - kept
        self._calls = ()

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.state is None else len(self.state.length)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._calls = ()


class VqlmCache(Cache):
    """``LMState`` as a cache of transformers: the same few megabytes after any number of tokens.

    Args:
        state: to go on from, such as that of a ``Prefix``; None: empty.
    """

    def __init__(self, state: LMState | None = None) -> None:
        n_token = 0 if state is None else int(state.length.max())
        super().__init__(layers=[VqlmLayer(state, n_token)])

    @property
    def whole(self) -> VqlmLayer:
        """Its only layer."""
        layer = self.layers[0]
        assert isinstance(layer, VqlmLayer)
        return layer

    @property
    def state(self) -> LMState | None:
        """What has been read; None if nothing has."""
        return self.whole.state
