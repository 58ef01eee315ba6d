"""One rank alone: a compute lane and a send lane for each level, and what hides behind what.

The rules are the engine's: a chain's hops follow one another, each takes its lane as soon as that is free for it; the
next unit's weights set out when this unit's compute begins; gradients set out when their unit's backward ends. While
any lane sends, compute is slower by the calibrated factor. Everything that can overlap a piece of compute has been
issued when it begins, so its end is known at once and no event queue is needed; the simulator plays the same rules
with one.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from thinwire.predict.states import Chain, UnitMoves


@dataclass(frozen=True)
class UnitWork:
    """A unit's compute for one micro-batch and what moves its states."""

    forward_s: float
    backward_s: float
    moves: UnitMoves


class Lanes:
    """When lanes are free, and how much compute was stretched by communication beside it."""

    def __init__(self, slowdown: float) -> None:
        self.rate = 1.0 / (1.0 + slowdown)
        self.gaps: dict[int, list[tuple[float, float]]] = {}
        """Of each lane, in order; the last never closes."""
        self.busy: list[tuple[float, float]] = []
        self.sent_s = 0.0
        self.stretched_s = 0.0

    def send(self, ready: float, hops: Chain) -> float:
        """Issue a chain at `ready`; when it arrives."""
        for level, seconds in hops:
            begin = self._slot(level, ready, seconds)
            ready = begin + seconds
            self.busy.append((begin, ready))
            self.sent_s += seconds
        return ready

    def _slot(self, level: int, ready: float, seconds: float) -> float:
        """Take the first time from `ready` on in which the lane is free for so long."""
        gaps = self.gaps.setdefault(level, [(0.0, math.inf)])
        for index, (opens, closes) in enumerate(gaps):
            begin = max(ready, opens)
            if begin + seconds <= closes:
                gaps[index : index + 1] = [g for g in ((opens, begin), (begin + seconds, closes)) if g[0] < g[1]]
                return begin
        raise AssertionError("the last gap never closes")

    def queued(self, now: float) -> dict[int, float]:
        """Seconds that each lane still sends after `now`."""
        return {level: max(0.0, gaps[-1][0] - now) for level, gaps in self.gaps.items()}

    def pile_up(self, now: float, before: dict[int, float], *, times: int) -> None:
        """Let what has come to wait in each lane since it was as `before` come `times` more (-1: not at all)."""
        if times < 0:
            self.busy.clear()  # with spans that are none
        for level, waiting in self.queued(now).items():
            free = now + max(0.0, waiting + times * (waiting - before.get(level, 0.0)))
            self.gaps[level] = [(free, math.inf)]
            self.busy.append((now, free))

    def compute(self, start: float, work: float) -> float:
        """When `work` seconds of compute that begin at `start` end."""
        now, left = start, work
        self.busy = [span for span in self.busy if span[1] > start]
        self.gaps = {level: [gap for gap in gaps if gap[1] > start] for level, gaps in self.gaps.items()}
        for begin, end in _union(self.busy):
            quiet = max(0.0, begin - now)
            if left <= quiet:
                break
            now, left = max(now, begin), left - quiet
            if left <= (end - now) * self.rate:
                now += left / self.rate
                self.stretched_s += now - start - work
                return now
            left -= (end - now) * self.rate
            now = end
        self.stretched_s += now + left - start - work
        return now + left


def _union(spans: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The spans merged where they touch, in order."""
    ordered = sorted(spans)
    if not ordered:
        return
    begin, end = ordered[0]
    for b, e in ordered[1:]:
        if b > end:
            yield begin, end
            begin, end = b, e
        else:
            end = max(end, e)
    yield begin, end


@dataclass(frozen=True)
class Habit:
    """Which of a unit's moves run behind compute."""

    prefetch: bool
    overlap_reduce: bool
    overlap_refresh: bool
    keep_gathered: bool


def forward(
    lanes: Lanes, start: float, units: list[UnitWork], habit: Habit, *, refreshing: list[float], first: bool
) -> float:
    """One forward through `units`; `refreshing` is when each unit's new weights arrive. Returns its end.

    Kept weights are gathered in the `first` forward of a step alone.
    """
    now = start
    if habit.keep_gathered and not first:
        for unit in units:
            now = lanes.compute(now, unit.forward_s)
        return now
    arrive = _gather(lanes, max(now, refreshing[0]), units[0])
    for index, unit in enumerate(units):
        begin = max(now, arrive, refreshing[index])
        following = index + 1 < len(units)
        if following and habit.prefetch:
            arrive = _gather(lanes, max(begin, refreshing[index + 1]), units[index + 1])
        now = lanes.compute(begin, unit.forward_s)
        if following and not habit.prefetch:
            arrive = _gather(lanes, max(now, refreshing[index + 1]), units[index + 1])
    return now


def backward(lanes: Lanes, start: float, units: list[UnitWork], habit: Habit, *, last: bool) -> tuple[float, float]:
    """One backward; returns its end, and when the last of its reductions arrives."""
    now, landed, backwards = start, start, units[::-1]
    arrive = start if habit.keep_gathered else lanes.send(start, backwards[0].moves.again)
    late: list[Chain] = []
    for index, unit in enumerate(backwards):
        begin = max(now, arrive)
        gathers = index + 1 < len(backwards) and not habit.keep_gathered
        if gathers and habit.prefetch:
            arrive = lanes.send(begin, backwards[index + 1].moves.again)
        now = lanes.compute(begin, unit.backward_s)
        if gathers and not habit.prefetch:
            arrive = lanes.send(now, backwards[index + 1].moves.again)
        sent = unit.moves.reduce_last if last else unit.moves.reduce_each
        if habit.overlap_reduce:
            landed = max(landed, lanes.send(now, sent))
        else:
            late.append(sent)
    if any(late):
        landed = lanes.send(now, _added(late))
        now = now if last else landed  # nothing comes after the last one but the optimizer
    return now, max(now, landed)


def refresh(lanes: Lanes, start: float, units: list[UnitWork], habit: Habit) -> list[float]:
    """Send the new weights in forward order; when each unit's arrive."""
    if not habit.overlap_refresh:
        end = lanes.send(start, _added([unit.moves.refresh for unit in units]))
        return [end] * len(units)
    return [lanes.send(start, unit.moves.refresh) for unit in units]


def _gather(lanes: Lanes, ready: float, unit: UnitWork) -> float:
    return lanes.send(ready, unit.moves.gather)


def _added(chains: list[Chain]) -> Chain:
    """Many chains as one: the seconds of each level added up."""
    sums: dict[int, float] = {}
    for level, seconds in chain.from_iterable(chains):
        sums[level] = sums.get(level, 0.0) + seconds
    return tuple(sums.items())
