"""What is made of parameters alone, kept while many short calls ask for it: see ``frozen``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """The product of some tensors: made anew whenever it is asked for, or, while somebody holds it
    and no gradient is wanted, once.  Holders may come and go in several threads.

    A tensor that is changed in place, or another one, makes it anew all the same; only what is
    written behind torch's back (``tensor.data``) goes unnoticed until the last holder has gone.
    """

    def __init__(self) -> None:
        self._holders, self._lock = 0, threading.Lock()
        self._made: tuple[list[tuple[int, int]], Made] | None = None

    def get(self, make: Callable[[], Made], *sources: Tensor) -> Made:
        """What ``make``, which reads nothing but ``sources``, gives or gave."""
        if not self._holders or torch.is_grad_enabled() or any(x.is_inference() for x in sources):
            return make()
        found, made = [(x.data_ptr(), x._version) for x in sources], self._made
        if made is None or made[0] != found:
            self._made = made = found, make()
        return made[1]

    def hold(self, more: int) -> None:
        """One holder more (1) or less (-1); the last to go clears it."""
        with self._lock:
            self._holders += more
            if self._holders == 0:
                self._made = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[Made]:
        return type(self)()

    def __reduce__(self) -> tuple[type[Kept[Made]], tuple[()]]:
        return type(self), ()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, all of the model is in evaluation mode; then each module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, what is made of parameters alone (position biases, codes) is made once, not in
    every call without gradient: most of what decoding a token does beside its products.

    Parameters that change in it all the same are noticed, unless through ``tensor.data``.
    """
    found = (getattr(module, "kept", None) for module in model.modules())
    kept = [one for one in found if isinstance(one, Kept)]
    for one in kept:
        one.hold(1)
    try:
        yield
    finally:
        for one in kept:
            one.hold(-1)
