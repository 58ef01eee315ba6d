"""What hides behind what: a rank with a compute stream and a send stream per level, through the micro-batches of a step.

The rules are the engine's: a chain's hops follow one another, each takes its stream as soon as that is free for it; the
next unit's weights set out when this unit's compute begins; gradients set out when their unit's backward ends. While
any stream sends, compute is slower by the calibrated factor. Everything that can overlap a piece of compute has been
issued when it begins, so its end is known at once and no event queue is needed; the simulator follows the same rules
with one.

Three kinds of micro-batches differ: the first (new weights still arrive), those in the middle, and the last (gradients go
all the way). They are simulated once with a few blocks; blocks are equal, so the rest of them repeats the last
one's time.
"""

import math
from collections.abc import Iterable, Iterator
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


class Streams:
    """When streams are free, and how much compute was stretched by communication beside it."""

    def __init__(self, slowdown: float) -> None:
        self.rate = 1.0 / (1.0 + slowdown)
        self.gaps: dict[int, list[tuple[float, float]]] = {}
        """Of each stream, in order; the last never closes."""
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
        """Take the first time from `ready` on in which the stream is free for so long."""
        gaps = self.gaps.setdefault(level, [(0.0, math.inf)])
        for index, (opens, closes) in enumerate(gaps):
            begin = max(ready, opens)
            if begin + seconds <= closes:
                gaps[index : index + 1] = [g for g in ((opens, begin), (begin + seconds, closes)) if g[0] < g[1]]
                return begin
        raise AssertionError("the last gap never closes")

    def queued(self, now: float) -> dict[int, float]:
        """Seconds that each stream still sends after `now`."""
        return {level: max(0.0, gaps[-1][0] - now) for level, gaps in self.gaps.items()}

    def pile_up(self, now: float, before: dict[int, float], *, times: int) -> None:
        """Let what has come to wait in each stream since it was as `before` come `times` more (-1: not at all)."""
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
class OverlapPolicy:
    """Which of a unit's moves run behind compute."""

    prefetch: bool
    overlap_reduce: bool
    overlap_refresh: bool
    keep_gathered: bool


def forward(
    streams: Streams,
    start: float,
    units: list[UnitWork],
    policy: OverlapPolicy,
    *,
    refreshing: list[float],
    first: bool,
) -> float:
    """One forward through `units`; `refreshing` is when each unit's new weights arrive. Returns its end.

    Kept weights are gathered in the `first` forward of a step alone.
    """
    now = start
    if policy.keep_gathered and not first:
        for unit in units:
            now = streams.compute(now, unit.forward_s)
        return now
    arrive = _gather(streams, max(now, refreshing[0]), units[0])
    for index, unit in enumerate(units):
        begin = max(now, arrive, refreshing[index])
        following = index + 1 < len(units)
        if following and policy.prefetch:
            arrive = _gather(streams, max(begin, refreshing[index + 1]), units[index + 1])
        now = streams.compute(begin, unit.forward_s)
        if following and not policy.prefetch:
            arrive = _gather(streams, max(now, refreshing[index + 1]), units[index + 1])
    return now


def backward(
    streams: Streams, start: float, units: list[UnitWork], policy: OverlapPolicy, *, last: bool
) -> tuple[float, float]:
    """One backward; returns its end, and when the last of its reductions arrives."""
    now, landed, backwards = start, start, units[::-1]
    arrive = start if policy.keep_gathered else streams.send(start, backwards[0].moves.again)
    late: list[Chain] = []
    for index, unit in enumerate(backwards):
        begin = max(now, arrive)
        gathers = index + 1 < len(backwards) and not policy.keep_gathered
        if gathers and policy.prefetch:
            arrive = streams.send(begin, backwards[index + 1].moves.again)
        now = streams.compute(begin, unit.backward_s)
        if gathers and not policy.prefetch:
            arrive = streams.send(now, backwards[index + 1].moves.again)
        sent = unit.moves.reduce_last if last else unit.moves.reduce_each
        if policy.overlap_reduce:
            landed = max(landed, streams.send(now, sent))
        else:
            late.append(sent)
    if any(late):
        landed = streams.send(now, added(late))
        now = now if last else landed  # nothing comes after the last one but the optimizer
    return now, max(now, landed)


def refresh(streams: Streams, start: float, units: list[UnitWork], policy: OverlapPolicy) -> list[float]:
    """Send the new weights in forward order; when each unit's arrive."""
    if not policy.overlap_refresh:
        end = streams.send(start, added([unit.moves.refresh for unit in units]))
        return [end] * len(units)
    return [streams.send(start, unit.moves.refresh) for unit in units]


def _gather(streams: Streams, ready: float, unit: UnitWork) -> float:
    return streams.send(ready, unit.moves.gather)


def added(chains: list[Chain]) -> Chain:
    """Many chains as one: the seconds of each level added up."""
    sums: dict[int, float] = {}
    for level, seconds in chain.from_iterable(chains):
        sums[level] = sums.get(level, 0.0) + seconds
    return tuple(sums.items())


SIMULATED, PERIOD = 4, 2
"""Blocks simulated one by one; more of them add the difference that the last `PERIOD` made (not only the last: where
gathers and reductions share a stream, blocks take turns in waiting)."""


@dataclass(frozen=True)
class SteadyState:
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

    def chunked(self, chunks: int) -> list[list[UnitWork]]:
        """Units chunk by chunk; the first chunk has what comes before the blocks, the last one what comes after."""
        share = [self.blocks // chunks + (i < self.blocks % chunks) for i in range(chunks)]
        found = [[self.block] * count for count in share]
        found[0] = [*self.before, *found[0]]
        found[-1] = [*found[-1], *self.after]
        return found

    def listed(self, blocks: int) -> list[UnitWork]:
        return [*self.before, *([self.block] * blocks), *self.after]

    @property
    def silent(self) -> bool:
        """Whether nothing of it ever moves along the data axis."""
        return not any((unit.moves.gather or unit.moves.reduce_last or unit.moves.refresh) for unit in self.listed(1))


def steady_state(units: StageUnits, policy: OverlapPolicy, *, micro_batches: int, slowdown: float) -> SteadyState:
    """Simulate the kinds of micro-batches, and extend them to the number of blocks there is."""
    if units.silent:
        listed = units.listed(1)
        ahead = sum(unit.forward_s for unit in listed) + (units.blocks - 1) * units.block.forward_s
        back = sum(unit.backward_s for unit in listed) + (units.blocks - 1) * units.block.backward_s
        return SteadyState(ahead + back, ahead + back, ahead + back, ahead / (ahead + back), 0.0, 0.0, 0.0)
    if units.blocks <= SIMULATED:
        return _simulate(units.listed(units.blocks), policy, micro_batches, slowdown)
    more = _simulate(units.listed(SIMULATED), policy, micro_batches, slowdown)
    less = _simulate(units.listed(SIMULATED - PERIOD), policy, micro_batches, slowdown)
    return _extend(more, less, (units.blocks - SIMULATED) / PERIOD)


def _extend(more: SteadyState, less: SteadyState, times: float) -> SteadyState:
    def grown(name: str) -> float:
        value = float(getattr(more, name))
        return value + times * (value - float(getattr(less, name)))

    names = ("first_s", "middle_s", "last_s", "tail_s", "sent_s", "stretched_s")
    first, middle, last, tail, sent, stretched = (grown(name) for name in names)
    return SteadyState(first, middle, last, more.forward_share, max(0.0, tail), sent, max(0.0, stretched))


def _simulate(listed: list[UnitWork], policy: OverlapPolicy, micro_batches: int, slowdown: float) -> SteadyState:
    streams = Streams(slowdown)
    arrive = refresh(streams, 0.0, listed, policy)
    landed = [0.0] * len(listed)
    single = micro_batches == 1
    ahead = forward(streams, 0.0, listed, policy, refreshing=arrive, first=True)
    first, tail_end = backward(streams, ahead, listed, policy, last=single)
    if single:
        share = ahead / first
        return SteadyState(first, first, first, share, tail_end - first, streams.sent_s, streams.stretched_s)
    sent, stretched, queued = streams.sent_s, streams.stretched_s, streams.queued(first)
    ahead = forward(streams, first, listed, policy, refreshing=landed, first=False)
    middle, _ = backward(streams, ahead, listed, policy, last=False)
    share = (ahead - first) / (middle - first)
    middle_sent, middle_stretched = streams.sent_s - sent, streams.stretched_s - stretched
    streams.pile_up(middle, queued, times=micro_batches - 3)
    ahead = forward(streams, middle, listed, policy, refreshing=landed, first=False)
    last, tail_end = backward(streams, ahead, listed, policy, last=True)
    times = micro_batches - 3
    return SteadyState(
        first,
        middle - first,
        last - middle,
        share,
        tail_end - last,
        streams.sent_s + times * middle_sent,
        streams.stretched_s + times * middle_stretched,
    )
