"""Uses of a cut module that would give wrong numbers are refused, each with the way out."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor

from thinwire.errors import UseError
from thinwire.partition.flat import Flat


def check_whole(flat: Flat, *, refreshing: bool) -> None:
    """Before a micro-batch: the parameters are still this buffer's, and nothing was written that would be lost.

    Raises UseError naming the parameter.
    """
    moved = flat.detached()
    if moved is not None:
        raise UseError(
            f"{moved} was moved, converted, replaced, frozen or unfrozen after shard(); do that before, then shard anew"
        )
    written = flat.written()
    if written and refreshing:
        raise UseError(
            f"{written[0]} was written to while its new value was on the way; call drain() between the step and the write"
        )
    if written and not flat.gathered:
        raise UseError(
            f"{written[0]} was written to while it was not whole; write inside `with engine.full_parameters()`"
        )


def refuse_backward(_: Tensor) -> NoReturn:
    """For gradients that would run through weights that are not there any more."""
    raise UseError("backward of a forward that ran outside engine.micro_batch; run both inside, evaluate under no_grad")


def refuse_gradient(name: str, *, inside: bool) -> NoReturn:
    """A gradient came that nobody would sum."""
    if not inside:
        raise UseError(f"a gradient of {name} came outside engine.micro_batch; run forward and backward inside")
    raise UseError(
        f"a second gradient of {name} in one micro-batch; add the losses and call backward once (recompute of shared "
        f"weights needs use_reentrant=False)"
    )


def tensors_in(out: Any) -> Iterator[Tensor]:
    """The tensors in a module's output: in mappings, iterables, dataclasses and the attributes of other objects."""
    seen: set[int] = set()
    left = [out]
    while left:
        item = left.pop()
        if id(item) in seen or item is None or isinstance(item, str | bytes | bool | int | float):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            left.extend(item.values())
        elif dataclasses.is_dataclass(item):
            left.extend(getattr(item, field.name) for field in dataclasses.fields(item))
        elif isinstance(item, Iterable):
            left.extend(item)
        else:
            left.extend(getattr(item, "__dict__", {}).values())
