"""Orders that all ranks must share: a collective pairs what each of them issues first, second, third.

A rank whose forward skips a unit would take the weights of one unit for those of another, without a sound. What can be
agreed on (reductions, all-gathers after a step) is agreed on; what follows the forward itself (gathers) is compared:
over sockets and inside a host each gather says which one it is, and so does the end of a step; over NCCL the
step's are compared at its end.

The calls of a micro-batch: which units its forward called, and how far backward has come back through them.

Backward passes a unit's calls in the reverse order of forward, on every rank, also where no gradient comes on one of them:
so ranks that share weights gather the same ones in the same order. A forward that is recomputed in backward takes the
place of what backward has come through already. Pure.
"""

import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from thinwire.comm.collectives import all_reduce_small, compare
from thinwire.comm.world import World
from thinwire.errors import OtherExchangeError

Called = TypeVar("Called", bound=Hashable)
_END = 1
_DIGITS = 13
"""Of a digest, in hexadecimal: as many as a fp64 number holds."""
_UNITS, _MICRO_BATCHES, _REDUCTION = 2**13, 2**8, 2**21
"""What a reduction's tag tells apart, above the tags of gathers."""
_WAY_OUT = 'make every rank\'s forward use the same units in the same order, or set partition.params = "replica"'


def of_rank_0(order: list[int], world: World) -> list[int]:
    """Rank 0's `order` of as many numbers, on every rank."""
    places = torch.tensor(order if world.rank == 0 else [0] * len(order), dtype=torch.float64)
    all_reduce_small(places, world=world, op="max", purpose="control")
    return [int(place) for place in places]


def check_program(digest: str, counts: Mapping[str, int], world: World) -> None:
    """Ranks are about to train by the program of this `digest`, for models that `counts` describes.

    Raises UseError, on all ranks, if they are not alike.
    """
    own = [float(int(digest[:_DIGITS], 16)), *map(float, counts.values())]
    ends = torch.tensor([*own, *(-number for number in own)], dtype=torch.float64)
    all_reduce_small(ends, world=world, op="max")
    most, least = ends[: len(own)], -ends[len(own) :]
    if torch.equal(most, least):
        return
    found = zip(counts.items(), most.tolist()[1:], least.tolist()[1:], strict=True)
    differ = [
        f"{least:.0f} to {most:.0f} {name} (rank {world.rank} has {mine})"
        for (name, mine), most, least in found
        if most != least
    ]
    world.outstanding.raise_diverged(
        f"ranks are about to train different models, or under different plans: "
        f"{', '.join(differ) or 'as many units and numbers, of other shapes or at other levels'}; give every rank the same "
        f"model, plan and units"
    )


class Tags:
    """What ranks call their exchanges, so that none takes another's for its own. `names` are the units'."""

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self._world, self._names = world, list(names)

    def gather(self, unit: int) -> int:
        return unit + _END + 1

    def reduction(self, unit: int, micro_batch: int) -> int:
        return _REDUCTION + (micro_batch % _MICRO_BATCHES) * _UNITS + unit % _UNITS

    def name(self, tag: int) -> str:
        if tag == _END:
            return "came to the end of the step"
        if tag < _REDUCTION:
            return f"gathers the weights of unit {self._names[tag - _END - 1]}"
        return f"sums the gradients of unit {self._names[tag % _UNITS]}"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, ranks that are in different exchanges get a sentence: raises UseError, on all ranks in the end."""
        try:
            yield
        except OtherExchangeError as error:
            mine, theirs = self.name(error.mine), self.name(error.theirs)
            self._world.outstanding.raise_diverged(
                f"ranks that share weights have gone different ways: rank {self._world.rank} {mine}, another {theirs}; "
                f"{_WAY_OUT}"
            )


class GatherOrder:
    """What a rank gathers in a step, compared among the ranks that its weights are sharded over.

    `depth` is that of the weights; levels of one member do not count.
    """

    def __init__(self, world: World, depth: int, tags: Tags) -> None:
        self._world, self._tags = world, tags
        self._levels = [level for level in range(depth + 1) if world.fanout(level) > 1]
        self._sum = 0

    def tag(self, unit: int) -> int:
        """Of a gather of this unit, about to be issued."""
        self._sum = zlib.crc32(unit.to_bytes(4, "little"), self._sum)
        return self._tags.gather(unit)

    def check(self) -> None:
        """A step's gathers are over. Raises UseError, on all ranks that differ, if they have not gathered alike."""
        if all(map(self._world.has_tags, self._levels)):
            with self._tags.told():
                compare(_END, world=self._world, levels=self._levels)
        else:
            self._compare_sums()
        self._sum = 0

    def _compare_sums(self) -> None:
        """The numbers h of n ranks are all equal if and only if n times the sum of h² is the square of the sum of h."""
        tag = float(self._sum >> 12)  # 20 bits: sums over 8,192 ranks are exact
        sums = torch.tensor([1.0, tag, tag * tag], dtype=torch.float64)
        all_reduce_small(sums, world=self._world, levels=self._levels)
        ranks, total, squares = (int(number) for number in sums)
        if ranks * squares != total * total:
            self._world.outstanding.raise_diverged(
                f"ranks that share weights have gathered different units in this step; {_WAY_OUT}"
            )


class CallOrder(Generic[Called]):
    """Calls of units are numbered in the order of forward."""

    def __init__(self) -> None:
        self._calls: list[Called] = []
        self._first: dict[Called, int] = {}
        self._position = 0
        """Calls from here on are those that backward has come through."""

    def begin(self) -> None:
        """A micro-batch begins."""
        self._calls, self._first, self._position = [], {}, 0

    def called(self, unit: Called, *, again: bool) -> int:
        """A unit was called, in forward or (`again`) in a recomputed one; the number of the call."""
        if again and self._position < len(self._calls):
            del self._calls[self._position :]
            self._first = {}
            for number, call in enumerate(self._calls):
                self._first.setdefault(call, number)
        self._first.setdefault(unit, len(self._calls))
        self._calls.append(unit)
        self._position = len(self._calls)
        return self._position - 1

    def again(self) -> None:
        """Another backward begins at the end."""
        self._position = len(self._calls)

    def back_to(self, number: int) -> Iterator[Called]:
        """Backward has come to a call: it and those that have been passed over, latest first."""
        while self._position > number:
            self._position -= 1
            yield self._calls[self._position]

    def is_over(self, unit: Called) -> bool:
        """Whether backward has come through all calls of a unit, and past the first."""
        return self._first.get(unit, self._position + 1) > self._position

    def has_passed(self, unit: Called) -> bool:
        """Whether a unit was called, and backward is past all its calls."""
        return unit in self._first and self.is_over(unit)
