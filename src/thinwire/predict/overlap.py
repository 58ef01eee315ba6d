"""What moves a unit's states, beside its compute.

The rules are the engine's: a chain's hops follow one another, each takes its stream as soon as that is free for it; the
next unit's weights set out when this unit's compute begins; gradients set out when their unit's backward ends. While
any stream sends, compute is slower by the calibrated factor. `simulate.py` plays them, `bound.py` bounds what comes of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

Chain = tuple[tuple[int, float], ...]
"""(level, seconds) of hops that follow one another."""


@dataclass(frozen=True)
class UnitMoves:
    """Seconds of everything that moves one unit's states: hop by hop what goes on behind compute, and a rank's own work.

    Its own are the part of a transfer that a level leaves to the ranks, coding, adding up, and taking gradients over.
    """

    gather: Chain = ()
    """Weights are gathered: each micro-batch, outermost hop first."""
    again: Chain = ()
    """The same in backward; none if the unit stays unsharded from forward on."""
    reduce_each: Chain = ()
    """Gradients of a micro-batch reach their level."""
    reduce_last: Chain = ()
    """Those of the last micro-batch reach theirs, and are then summed over everything outside it."""
    refresh: Chain = ()
    """New weights go from where they were updated to where they are kept."""
    own_forward_s: float = 0.0
    own_backward_s: float = 0.0
    own_once_s: float = 0.0
    """Once a step: the last reductions' way beyond those of each micro-batch, new weights, and kept ones' gather."""


@dataclass(frozen=True)
class UnitWork:
    """A unit's compute for one micro-batch and what moves its states."""

    forward_s: float
    backward_s: float
    moves: UnitMoves


@dataclass(frozen=True)
class OverlapPolicy:
    """Which of a unit's moves run behind compute."""

    prefetch: bool
    overlap_reduce: bool
    overlap_refresh: bool
    keep_gathered: bool


def added(chains: Iterable[Chain]) -> Chain:
    """Many chains as one: the seconds of each level added up."""
    sums: dict[int, float] = {}
    for level, seconds in chain.from_iterable(chains):
        sums[level] = sums.get(level, 0.0) + seconds
    return tuple(sums.items())


@dataclass(frozen=True)
class StageUnits:
    """Units of a stage: `blocks` equal ones between what the first and the last stage have besides."""

    before: tuple[UnitWork, ...]
    block: UnitWork
    blocks: int
    after: tuple[UnitWork, ...]

    def chunked(self, chunks: int) -> list[list[UnitWork]]:
        """Units chunk by chunk; the first chunk has what comes before the blocks, the last one what comes after."""
        found = [[self.block] * count for count in shares(self.blocks, chunks)]
        found[0] = [*self.before, *found[0]]
        found[-1] = [*found[-1], *self.after]
        return found


def shares(blocks: int, chunks: int) -> list[int]:
    """A stage's blocks by chunk."""
    return [blocks // chunks + (i < blocks % chunks) for i in range(chunks)]


def grouped(blocks: int, together: int) -> list[int]:
    """How many blocks travel together each time; what is left over comes first."""
    rest = blocks % together
    return [*([rest] if rest else []), *[together] * (blocks // together)]
