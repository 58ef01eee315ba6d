"""Uses of a sharded module that would give wrong numbers are refused, each with the way out.

Parameters that no rank has a gradient for in a step: the optimizer leaves them alone, as it does where `.grad` is None.

A zero would move them: momentum, Adam's moments and weight decay do not stop at it. Every rank knows of its own backward;
what none of them has is found out by an exchange of one bit a parameter, behind the last reductions.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from thinwire.comm.collectives import gather_small
from thinwire.comm.handle import Handle
from thinwire.comm.world import World
from thinwire.errors import UseError
from thinwire.parallel.shard.accumulation import GradAccumulation
from thinwire.parallel.shard.flat import Flat

_PLAIN = (str, bytes, bool, int, float, complex, Iterator, torch.dtype, torch.device)


def check_parameters(root: nn.Module) -> None:
    """Before anything is sharded: every parameter can be. Raises UseError naming the first that cannot."""
    for name, parameter in root.named_parameters():
        if is_lazy(parameter):
            raise UseError(f"{name} has no shape yet; run one forward before shard()")
        if parameter.grad is not None:
            raise UseError(f"{name} has a gradient from before shard(); call model.zero_grad() first")
        if parameter.requires_grad and not parameter.is_leaf:
            raise UseError(f"{name} is computed from other tensors; detach it before shard()")


def check_flat(flat: Flat) -> None:
    """Before a micro-batch: the parameters are still this buffer's. Raises UseError naming the parameter."""
    moved = flat.detached()
    if moved is not None:
        raise UseError(
            f"{moved} was moved, converted, replaced, frozen or unfrozen after shard(); do that before, then shard anew"
        )


def refuse_backward(_: Tensor) -> NoReturn:
    """For gradients that nobody would sum."""
    raise UseError("backward of a forward that ran outside engine.micro_batch; run both inside, evaluate under no_grad")


def refuse_grad(unit: str) -> NoReturn:
    """For gradients that are looked at where they are not any more."""
    raise UseError(
        f"gradients of unit {unit} are summed over ranks, in shards: .grad of its parameters is not on this rank; their "
        "norm is engine.grad_norm(), and optimizer.step(grad_scale=...) scales (clips) them"
    )


def refuse_spoilt() -> NoReturn:
    """A step goes on, some of whose gradients are those of half a micro-batch."""
    raise UseError(
        "a micro-batch failed after gradients of it had been added to those of others: call optimizer.skip(), then run the "
        "step's micro-batches again"
    )


def refuse_transform(error: Exception) -> None:
    """torch.func's transforms do not run where saved tensors have hooks (`thinwire.parallel.shard.saved`), and say so."""
    if "saved tensor hooks" in str(error):
        raise UseError(
            "a unit whose parameters are sharded calls torch.func.grad or another transform in its forward: leave it out of "
            'shard()\'s `units`, or set partition.keep_gathered = true or partition.params = "replica"'
        ) from None


def refuse_outside(unit: str) -> NoReturn:
    """A gradient came that nobody would sum."""
    raise UseError(f"a gradient of unit {unit} came outside engine.micro_batch; run forward and backward inside")


def refuse_second(unit: str) -> NoReturn:
    """A gradient came after the unit's were summed."""
    raise UseError(
        f"a second gradient of unit {unit} in one backward, after the first had been summed; recompute shared weights "
        "with use_reentrant=False"
    )


def tensors_in(out: Any) -> Iterator[Tensor]:
    """The tensors in a module's output: in mappings, collections, dataclasses and the attributes of other objects.

    Iterators and functions are left as they are: they can be used up once.
    """
    seen: set[int] = set()
    left = [out]
    while left:
        item = left.pop()
        found = isinstance(item, Tensor)
        if id(item) in seen or (not found and (item is None or isinstance(item, _PLAIN) or callable(item))):
            continue
        seen.add(id(item))
        if found:
            yield item
        elif isinstance(item, Mapping):
            left.extend(item.values())
        elif dataclasses.is_dataclass(item):
            left.extend(getattr(item, field.name) for field in dataclasses.fields(item))
        elif isinstance(item, Iterable):
            left.extend(item)
        else:
            left.extend(getattr(item, "__dict__", {}).values())


class NoGradients:
    """Of the trained buffers' `grads`, which are in the same order on all ranks."""

    def __init__(self, grads: Sequence[GradAccumulation], world: World) -> None:
        self._grads, self._world = grads, world
        self._names = [name for of_buffer in grads for name in of_buffer.parameters]
        self.names: frozenset[str] = frozenset()
        """Parameters that nobody has a gradient for, once the latest exchange has come to its end."""

    def hops(self) -> Iterator[Handle]:
        """Tell all ranks, level by level, which gradients have come here so far in this step."""
        world = self._world
        came = _packed([came for of_buffer in self._grads for came in of_buffer.came])
        for level in range(len(world.cluster.levels)):
            if world.fanout(level) > 1:
                everyone = torch.empty(world.fanout(level), len(came), dtype=torch.uint8)
                yield gather_small(everyone, came, world=world, level=level, purpose="control")
                came = everyone[0].clone()
                for theirs in everyone[1:]:
                    came |= theirs
        flags = _unpacked(came, len(self._names))
        self.names = frozenset(name for name, flag in zip(self._names, flags, strict=True) if not flag)


def _packed(flags: Sequence[bool]) -> torch.Tensor:
    """(n / 8,) uint8, the first flag in the lowest bit."""
    return torch.from_numpy(np.packbits(np.array(flags, dtype=bool), bitorder="little"))


def _unpacked(packed: torch.Tensor, n: int) -> list[bool]:
    flags: list[bool] = np.unpackbits(packed.numpy(), count=n, bitorder="little").astype(bool).tolist()
    return flags
