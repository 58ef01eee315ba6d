"""A lower bound of the simulated step, without an event queue; where passes move no states it is the step.

What is proven, with k = s / (1 + s) for compute that is slower by s beside collectives:

1. A chain takes at least the sum of its hops from its start to its arrival, whatever else its streams carry.
2. While compute of c seconds and a chain of g seconds that sets out at its beginning both take place, T >= g and
   T >= c + k g: compute that ends after e has done e - k (busy seconds until e), and g - (T - e) of the chain at least are
   among those. So a pass that gathers the next unit's weights beside this unit's compute takes at least
   g(0) + sum of max(g(i + 1), c(i) + k g(i + 1)).
3. The same of a whole stage: from its first pass to the arrival of its last gradient, T >= C + k U + (1 - k) I, of which C
   is all compute, U what its busiest stream carries in that time, and I time in which it cannot compute. And T >= U.
4. New weights have their streams to themselves: gathers go over levels inside theirs, and no gradient sets out before all
   of them are there. They arrive in forward order, each level carrying one at a time.
5. A stream that gets work w(i) at a(i) or later, a(i) in order, is not done before the largest of a(i) + w(i) + w(i + 1) ...
6. A pipeline's passes are a max-plus recurrence (`course.py`): with lower bounds of its passes it gives a lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.course import StagePasses, course
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.overlap import Chain, OverlapPolicy, UnitWork, added
from thinwire.predict.placement import Axes
from thinwire.predict.step import Core, StageWork, optimizer_s, overlap_policy, own_once_s, stage_work


def chain_s(chain: Chain) -> float:
    return sum(seconds for _, seconds in chain)


@dataclass(frozen=True)
class Walk:
    """A pass through units that wait for their weights: when each begins, from the start of the pass, and its end."""

    begins: tuple[float, ...]
    end_s: float


def walk(seconds: Sequence[float], gathers: Sequence[float], *, prefetch: bool, slow: float) -> Walk:
    """Rule 2 for units of `seconds` whose weights take `gathers` to arrive."""
    begins, now = [], gathers[0]
    for index, own in enumerate(seconds):
        begins.append(now)
        coming = gathers[index + 1] if index + 1 < len(seconds) else 0.0
        now += max(coming, own + slow * coming) if prefetch else own + coming
    return Walk(tuple(begins), now)


class StageBound:
    """Lower bounds of one kind of stage."""

    def __init__(self, work: StageWork, candidate: Candidate, policy: OverlapPolicy, times: int, slow: float) -> None:
        self.policy, self.times, self.slow = policy, times, slow
        self.chunks = work.units.chunked(candidate.chunks)
        units = [unit for chunk in self.chunks for unit in chunk]
        refreshed = refresh_arrivals(units, policy)
        late_s = 0.0
        if not policy.overlap_reduce and candidate.pipeline == 1:
            late_s = chain_s(added([unit.moves.reduce_each for unit in units]))
        ahead, back, floors = [], [], []
        for chunk in self.chunks:
            ahead.append(self._forward(chunk, gathers=not policy.keep_gathered))
            back.append(self._backward(chunk))
            mine, refreshed = refreshed[: len(chunk)], refreshed[len(chunk) :]
            floors.append(self._floor(chunk, mine))
        self.waits_s = sum(walk.begins[0] for walk in (*ahead, *back))
        """Seconds of a micro-batch in which no compute can go on, reductions left out."""
        self.late_s = late_s
        self.last = back[0]
        self.passes = StagePasses(
            tuple(walk.end_s for walk in ahead), tuple(walk.end_s + late_s for walk in back), tuple(floors)
        )

    def _forward(self, units: list[UnitWork], *, gathers: bool) -> Walk:
        return self._walk(
            [unit.forward_s for unit in units], [chain_s(unit.moves.gather) if gathers else 0.0 for unit in units]
        )

    def _backward(self, units: list[UnitWork]) -> Walk:
        kept, order = self.policy.keep_gathered, units[::-1]
        return self._walk(
            [unit.backward_s for unit in order], [0.0 if kept else chain_s(unit.moves.again) for unit in order]
        )

    def _walk(self, seconds: list[float], gathers: list[float]) -> Walk:
        return walk(seconds, gathers, prefetch=self.policy.prefetch, slow=self.slow)

    def _floor(self, units: list[UnitWork], refreshed: list[float]) -> float:
        """When the first forward can end at the earliest: new weights arrive, and kept ones are gathered."""
        first = self._forward(units, gathers=True)
        arrive = [there + chain_s(unit.moves.gather) for there, unit in zip(refreshed, units, strict=True)]
        return max(there + first.end_s - begin for there, begin in zip(arrive, first.begins, strict=True))

    def landed_s(self, first_s: float, last_s: float) -> float:
        """When the last gradient can have arrived, if the first pass begins at `first_s` and the last at `last_s`."""
        units = self.chunks[0][::-1]
        tail_s = chain_s(units[-1].moves.reduce_last) if self.policy.overlap_reduce else 0.0
        moves = [unit.moves.reduce_last for unit in units]
        moves += [] if self.policy.keep_gathered else [unit.moves.again for unit in units]
        last = self._shared(sum(unit.backward_s for unit in units), added(moves), self.last.begins[0] + tail_s)
        return max(last_s + max(last, self._reduced_s(units)), first_s + self._whole_s(tail_s))

    def _reduced_s(self, units: list[UnitWork]) -> float:
        """From the beginning of the last pass to the arrival of its gradients: rule 5."""
        chains = [unit.moves.reduce_last for unit in units]
        if not self.policy.overlap_reduce:
            return self.last.end_s + chain_s(added(chains))
        issued = [begin + unit.backward_s for begin, unit in zip(self.last.begins, units, strict=True)]
        landed = max(self.last.end_s, *(t + chain_s(each) for t, each in zip(issued, chains, strict=True)))
        for level in {level for each in chains for level, _ in each}:
            using = [(t, each) for t, each in zip(issued, chains, strict=True) if any(at == level for at, _ in each)]
            head = min(_before(each, level) for _, each in using)
            done = 0.0
            for t, each in using:
                done = max(done, t + head) + sum(seconds for at, seconds in each if at == level)
            landed = max(landed, done + min(_before(each[::-1], level) for _, each in using))
        return landed

    def _whole_s(self, tail_s: float) -> float:
        """Rule 3 for everything from the stage's first pass on."""
        times, kept = self.times, self.policy.keep_gathered
        sums: dict[int, float] = {}
        compute = 0.0
        for unit in [unit for chunk in self.chunks for unit in chunk]:
            moves = unit.moves
            compute += times * (unit.forward_s + unit.backward_s)
            for chain, often in (
                (moves.gather, 1 if kept else times),
                (moves.again, 0 if kept else times),
                (moves.reduce_each, times - 1),
                (moves.reduce_last, 1),
            ):
                for level, seconds in chain:
                    sums[level] = sums.get(level, 0.0) + often * seconds
        idle_s = times * self.waits_s + (times - 1) * self.late_s + tail_s
        return self._shared(compute, tuple(sums.items()), idle_s)

    def _shared(self, compute_s: float, busy: Chain, idle_s: float) -> float:
        """Rule 3, for streams that are `busy` for so long."""
        busy_s = max((seconds for _, seconds in busy), default=0.0)
        return max(busy_s, compute_s + self.slow * busy_s + (1 - self.slow) * idle_s)


def _before(chain: Chain, level: int) -> float:
    """Seconds of the hops before the first one at `level`."""
    levels = [at for at, _ in chain]
    return chain_s(chain[: levels.index(level)])


def refresh_arrivals(units: Sequence[UnitWork], policy: OverlapPolicy) -> list[float]:
    """When the new weights of each unit arrive: rule 4."""
    if not policy.overlap_refresh:
        return [chain_s(added([unit.moves.refresh for unit in units]))] * len(units)
    free: dict[int, float] = {}
    found = []
    for unit in units:
        ready = 0.0
        for level, seconds in unit.moves.refresh:
            ready = free[level] = max(ready, free.get(level, 0.0)) + seconds
        found.append(ready)
    return found


def least_s(setting: Setting, candidate: Candidate, axes: Axes, core: Core) -> float:
    """Seconds that `simulate_step` takes at least."""
    slowdown, policy = setting.calibration.overlap_slowdown, overlap_policy(setting, candidate)
    works = stage_work(setting, candidate, axes, core)
    kinds = [StageBound(work, candidate, policy, core.micro_batches, slowdown / (1 + slowdown)) for work in works]
    stages = [stage for stage, work in zip(kinds, works, strict=True) for _ in range(work.equal.many)]
    found = course([stage.passes for stage in stages], micro_batches=core.micro_batches, send_s=core.send_s)
    landed = max(
        stage.landed_s(first, last) for stage, first, last in zip(stages, found.first_s, found.last_s, strict=True)
    )
    inner = landed + max(optimizer_s(setting, work.owned, axes) + own_once_s(work.units) for work in works)
    return inner if candidate.sync is None else least_with_rounds(setting, candidate.sync, inner)


def least_with_rounds(setting: Setting, sync: CandidateSync, inner: float) -> float:
    """The least step with rounds, if steps without take `inner` seconds at least: stalls fall as steps grow."""
    rounds = outer_round(setting, sync, inner)
    if sync.overlap_steps <= rounds.every_steps:
        return inner + rounds.stall_per_step_s
    return max(inner, rounds.travel_s / sync.overlap_steps)
