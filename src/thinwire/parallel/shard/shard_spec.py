"""Where the parts of a flat buffer lie on this rank, at each depth of its sharding, and how each of its hops codes."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import IDENTITY, Codec
from thinwire.comm.world import World
from thinwire.parallel.shard.layout import Interval, Layout, interval
from thinwire.parallel.shard.sharding import Sharding
from thinwire.plan.hops import G_GATHER, G_REDUCE, P_GATHER, P_REFRESH

_DRAWING = (P_GATHER, P_REFRESH, G_REDUCE, G_GATHER)
"""Purposes that draw random numbers, each its own."""
Part = tuple[str, tuple[int, ...], int, slice]
"""Of a parameter: its name, its shape, the first element of it that is here, and where those lie in what is held."""


class Coding(TypedDict):
    """How a collective codes: its arguments of these names."""

    codec: Codec
    seed: int


PLAIN: Coding = {"codec": IDENTITY, "seed": 0}


@dataclass(frozen=True)
class Draw:
    """Which random numbers a collective draws: it is the `number`-th of its kind since `step` steps were taken."""

    step: int
    number: int


class ShardSpec:
    """What this rank holds of a flat buffer of `layout`."""

    def __init__(self, layout: Layout, sharding: Sharding, world: World, device: torch.device) -> None:
        self.layout, self.sharding, self.world, self.device = layout, sharding, world, device
        fanouts, coordinates = [level.fanout for level in world.cluster.levels], world.cluster.coordinates(world.rank)
        self.outermost = len(fanouts) - 1
        self._held = {depth: interval(layout.numel, fanouts, coordinates, depth) for depth in range(-1, len(fanouts))}
        self._within: dict[tuple[int, int], slice] = {}
        self.step = 0
        """Steps taken before the one under way."""
        self.number = 0
        """Of this buffer among all."""
        self._draws: Counter[str] = Counter()
        self.bucket_bytes = 0
        """Up to this size messages of several buffers travel as one."""

    def at(self, depth: int) -> Interval:
        """The interval that this rank holds of a state that is sharded at `depth`, -1 (unsharded) to the outermost level."""
        return self._held[depth]

    def within(self, depth: int, outer: int) -> slice:
        """Where what this rank holds at `depth` lies in what it holds at `outer`, which is as deep or less."""
        found = self._within.get((depth, outer))
        if found is None:
            found = self._within[depth, outer] = self.at(depth).inside(self.at(outer))
        return found

    def first_replica(self, depth: int) -> bool:
        """Whether this rank is the first of those that hold the same of a state that is sharded at `depth`."""
        return not any(self.world.cluster.coordinates(self.world.rank)[depth + 1 :])

    def levels(self, first: int, last: int) -> list[int]:
        """Levels first..last that join more than one member."""
        return [level for level in range(first, last + 1) if self.world.fanout(level) > 1]

    def empty(self, depth: int, dtype: torch.dtype) -> Tensor:
        """Room for a state that is sharded at `depth`."""
        return torch.empty(len(self.at(depth)), dtype=dtype, device=self.device)

    def padding(self, depth: int) -> slice:
        """What of a state that is sharded at `depth` stands for no parameter: the end of it, on the last ranks."""
        mine = self.at(depth)
        return slice(min(len(mine), max(0, self.layout.used - mine.start)), len(mine))

    def parts(self, depth: int) -> Iterator[Part]:
        """What this rank holds at `depth`, parameter by parameter."""
        mine = self.at(depth)
        for slot in self.layout.slots:
            met = mine.meet(slot)
            if len(met):
                yield slot.name, slot.shape, met.start - slot.offset, met.inside(mine)

    def at_step(self, step: int, number: int) -> None:
        """What stochastic rounding draws from: steps taken so far, and the number of this buffer among all."""
        self.step, self.number = step, number
        self._draws.clear()

    def draw(self, purpose: str) -> Draw:
        """What a collective that begins now draws. Its later hops may be issued when the next step has begun: they keep
        it."""
        self._draws[purpose] += 1
        return Draw(self.step, self._draws[purpose])

    def coding(self, codecs: Mapping[int, Codec], level: int, depth: int, purpose: str, draw: Draw) -> Coding:
        """The codec of a level and its seed. Ranks that hold the same interval at `depth` draw the same numbers."""
        codec, part = codecs.get(level, IDENTITY), self.at(depth)
        if codec is IDENTITY:
            return PLAIN
        levels = len(self.world.cluster.levels)
        hop = (draw.number * levels + level) * len(_DRAWING) + _DRAWING.index(purpose)
        who = part.start // len(part)
        return {"codec": codec, "seed": (((draw.step << 20) + self.number << 16) + hop) * self.world.size + who}
