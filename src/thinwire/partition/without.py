"""Parameters that no rank has a gradient for in a step: the optimizer leaves them alone, as it does where `.grad` is None.

A zero would move them: momentum, Adam's moments and weight decay do not stop at it. Every rank knows of its own backward;
what none of them has is found out by an exchange of one bit a parameter, behind the last reductions.
"""

from collections.abc import Iterator, Sequence

import torch

from thinwire.comm.collectives import gather_small
from thinwire.comm.handle import Handle
from thinwire.comm.world import World
from thinwire.partition.flat import Flat


class Without:
    """Of the trained `flats`, which are in the same order on all ranks."""

    def __init__(self, flats: Sequence[Flat], world: World) -> None:
        self._flats, self._world = flats, world
        self._names = [name for flat in flats for name in flat.parameters]
        self.names: frozenset[str] = frozenset()
        """Parameters that nobody has a gradient for, once the latest chain has come to its end."""

    def chain(self) -> Iterator[Handle]:
        """Tell all ranks, level by level, which gradients have come here so far in this step."""
        world = self._world
        came = _packed([came for flat in self._flats for came in flat.sums.came])
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
    number = sum(flag << place for place, flag in enumerate(flags))
    return torch.tensor(list(number.to_bytes(-(-len(flags) // 8), "little")), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor, n: int) -> list[bool]:
    return [bool(packed[place // 8] >> place % 8 & 1) for place in range(n)]
