"""Orders that all ranks must share: a collective pairs what each of them issues first, second, third.

A rank whose forward skips a unit would take the weights of one unit for those of another, without a sound. What can be
agreed on (reductions, refreshes) is agreed on; what follows the forward itself (gathers) is compared once a step.
"""

import zlib

import torch

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.errors import UseError

_SHOWN = 12
"""Units named in an error."""


def of_rank_0(order: list[int], world: World) -> list[int]:
    """Rank 0's `order` of as many numbers, on every rank."""
    places = torch.tensor(order if world.rank == 0 else [0] * len(order), dtype=torch.float64)
    all_reduce_small(places, world=world, op="max", purpose="control")
    return [int(place) for place in places]


class GatherOrder:
    """What a rank has gathered in a step, to be compared among the ranks that its weights are cut over.

    `depth` is that of the weights; levels of one member do not count.
    """

    def __init__(self, world: World, depth: int) -> None:
        self._world = world
        self._levels = [level for level in range(depth + 1) if world.fanout(level) > 1]
        self._tag, self._count, self._names = 0, 0, list[str]()

    def note(self, name: str) -> None:
        """A gather of the unit of this name is issued."""
        if self._levels:
            self._tag, self._count = zlib.crc32(name.encode() + b"\n", self._tag), self._count + 1
            if self._count <= _SHOWN:
                self._names.append(name)

    def check(self) -> None:
        """Compare, and start anew. Raises UseError, on all these ranks, if they have not gathered alike.

        The numbers h of n ranks are all equal if and only if n times the sum of h² is the square of the sum of h.
        """
        if not self._levels:
            return
        tag = float(self._tag >> 12)  # 20 bits: sums over 8,192 ranks are exact
        sums = torch.tensor([1.0, tag, tag * tag], dtype=torch.float64)
        all_reduce_small(sums, world=self._world, levels=self._levels)
        ranks, total, squares = (int(number) for number in sums)
        if ranks * squares != total * total:
            shown = ", ".join(self._names) + (", ..." if self._count > _SHOWN else "")
            raise UseError(
                f"ranks that share weights gathered different units in this step, or in different orders (here: "
                f'{shown or "none"}); make every rank\'s forward use the same units, or set partition.params = "replica"'
            )
        self._tag, self._count, self._names = 0, 0, []
