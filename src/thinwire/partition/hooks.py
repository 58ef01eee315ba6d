"""Hooks on a module that stay behind when it is copied or pickled, and that `torch.compile` leaves alone.

A copy of a cut module (an EMA, a file) is a plain module: its forward must not drive the engine of the one it is made from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def nothing(*_: Any, **__: Any) -> None:
    """What a hook is in a copy."""


def _nothing() -> Callable[..., None]:
    return nothing


class Hook:
    """`act`, run in eager mode."""

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = torch._disable_dynamo(partial(act))  # a part of its own: torch keeps what it makes of it there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _nothing, ()
