"""Attention made wrong on purpose, to see that the checks before a measurement notice."""

from collections.abc import Callable
from typing import Any


def wrong_output(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, state = attention(*args, **kwargs)
        return out * (1 + 1e-6), state

    return wrong


def wrong_gradient(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **{**kwargs, "cache_grad": False})

    return wrong


def not_a_number(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, state = attention(*args, **kwargs)
        return out * float("nan"), state

    return wrong
