"""The micro-batches of one stage in the course of a step, communication of the data axis included.

Three kinds differ: the first (new weights still arrive), those in the middle, and the last (gradients go all the way).
They are played through once with a few blocks; blocks are equal, so the rest of them repeats the last one's time.
"""

from dataclasses import dataclass

from thinwire.predict.overlap import Habit, Lanes, UnitWork, backward, forward, refresh

PLAYED, PERIOD = 4, 2
"""Blocks played through one by one; more of them add the difference that the last `PERIOD` made (not only the last: where
gathers and reductions share a lane, blocks take turns in waiting)."""


@dataclass(frozen=True)
class Rhythm:
    """Seconds of a stage's micro-batches, from the arrival of their input; compute and exposed communication."""

    first_s: float
    middle_s: float
    last_s: float
    forward_share: float
    """Part of a middle micro-batch that is forward."""
    tail_s: float
    """From the end of the last backward to the arrival of the last gradient."""
    sent_s: float
    """Seconds of all collectives of the data axis, hidden and exposed."""
    stretched_s: float
    """By how much compute was slower because of them."""

    def step_s(self, micro_batches: int) -> float:
        """All micro-batches and the tail, of a stage that never waits for another."""
        if micro_batches == 1:
            return self.last_s + self.tail_s
        return self.first_s + (micro_batches - 2) * self.middle_s + self.last_s + self.tail_s


@dataclass(frozen=True)
class StageUnits:
    """Units of a stage: `blocks` equal ones between what the first and the last stage have besides."""

    before: tuple[UnitWork, ...]
    block: UnitWork
    blocks: int
    after: tuple[UnitWork, ...]

    def listed(self, blocks: int) -> list[UnitWork]:
        return [*self.before, *([self.block] * blocks), *self.after]

    @property
    def silent(self) -> bool:
        """Whether nothing of it ever moves along the data axis."""
        return not any((unit.moves.gather or unit.moves.reduce_last or unit.moves.refresh) for unit in self.listed(1))


def rhythm(units: StageUnits, habit: Habit, *, micro_batches: int, slowdown: float) -> Rhythm:
    """Play the kinds of micro-batches through, and extend them to the number of blocks there is."""
    if units.silent:
        listed = units.listed(1)
        ahead = sum(unit.forward_s for unit in listed) + (units.blocks - 1) * units.block.forward_s
        back = sum(unit.backward_s for unit in listed) + (units.blocks - 1) * units.block.backward_s
        return Rhythm(ahead + back, ahead + back, ahead + back, ahead / (ahead + back), 0.0, 0.0, 0.0)
    if units.blocks <= PLAYED:
        return _play(units.listed(units.blocks), habit, micro_batches, slowdown)
    more = _play(units.listed(PLAYED), habit, micro_batches, slowdown)
    less = _play(units.listed(PLAYED - PERIOD), habit, micro_batches, slowdown)
    return _extend(more, less, (units.blocks - PLAYED) / PERIOD)


def _extend(more: Rhythm, less: Rhythm, times: float) -> Rhythm:
    def grown(name: str) -> float:
        value = float(getattr(more, name))
        return value + times * (value - float(getattr(less, name)))

    names = ("first_s", "middle_s", "last_s", "tail_s", "sent_s", "stretched_s")
    first, middle, last, tail, sent, stretched = (grown(name) for name in names)
    return Rhythm(first, middle, last, more.forward_share, max(0.0, tail), sent, max(0.0, stretched))


def _play(listed: list[UnitWork], habit: Habit, micro_batches: int, slowdown: float) -> Rhythm:
    lanes = Lanes(slowdown)
    arrive = refresh(lanes, 0.0, listed, habit)
    landed = [0.0] * len(listed)
    single = micro_batches == 1
    ahead = forward(lanes, 0.0, listed, habit, refreshing=arrive, first=True)
    first, tail_end = backward(lanes, ahead, listed, habit, last=single)
    if single:
        share = ahead / first
        return Rhythm(first, first, first, share, tail_end - first, lanes.sent_s, lanes.stretched_s)
    sent, stretched, queued = lanes.sent_s, lanes.stretched_s, lanes.queued(first)
    ahead = forward(lanes, first, listed, habit, refreshing=landed, first=False)
    middle, _ = backward(lanes, ahead, listed, habit, last=False)
    share = (ahead - first) / (middle - first)
    middle_sent, middle_stretched = lanes.sent_s - sent, lanes.stretched_s - stretched
    lanes.pile_up(middle, queued, times=micro_batches - 3)
    ahead = forward(lanes, middle, listed, habit, refreshing=landed, first=False)
    last, tail_end = backward(lanes, ahead, listed, habit, last=True)
    times = micro_batches - 3
    return Rhythm(
        first,
        middle - first,
        last - middle,
        share,
        tail_end - last,
        lanes.sent_s + times * middle_sent,
        lanes.stretched_s + times * middle_stretched,
    )
