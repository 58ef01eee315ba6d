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
from functools import lru_cache

from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.course import StagePasses, course
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.overlap import Chain, OverlapPolicy, UnitWork, added
from thinwire.predict.placement import Axes
from thinwire.predict.step import Core, StageWork, optimizer_s, overlap_policy, own_once_s, stage_work


@lru_cache(maxsize=4096)
def chain_s(chain: Chain) -> float:
    return sum(seconds for _, seconds in chain)


@lru_cache(maxsize=4096)
def _hops(chain: Chain) -> dict[int, tuple[float, float, float]]:
    """Level -> seconds of a chain before its first hop there, at the level, and after the last one there."""
    found = {}
    for level in {level for level, _ in chain}:
        at = [index for index, (each, _) in enumerate(chain) if each == level]
        inside = sum(chain[index][1] for index in at)
        found[level] = chain_s(chain[: at[0]]), inside, chain_s(chain[at[-1] + 1 :])
    return found


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
        beside = self._shared(sum(unit.forward_s for unit in units), added([unit.moves.refresh for unit in units]), 0.0)
        floors[-1] = max(floors[-1], beside)
        self.waits_s = sum(walk.begins[0] for walk in (*ahead, *back))
        """Seconds of a micro-batch in which no compute can go on, reductions left out."""
        self.late_s = late_s
        self.back = back
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

    def landed_s(self, first_s: float, last_s: Sequence[float]) -> float:
        """When the last gradient can have arrived.

        The first pass begins at `first_s`, the backward of the last micro-batch of each chunk at `last_s`, the first
        chunk's last.
        """
        units = self.chunks[0][::-1]
        tail_s = chain_s(units[-1].moves.reduce_last) if self.policy.overlap_reduce else 0.0
        moves = [unit.moves.reduce_last for unit in units]
        moves += [] if self.policy.keep_gathered else [unit.moves.again for unit in units]
        compute = sum(unit.backward_s for unit in units)
        last = self._shared(compute, added(moves), self.back[0].begins[0] + tail_s)
        return max(last_s[0] + last, self._reduced_s(last_s), first_s + self._whole_s(tail_s), self._after_s(first_s))

    def _reduced_s(self, last_s: Sequence[float]) -> float:
        """When gradients of the last micro-batch can have arrived: rule 5."""
        issued: list[tuple[float, Chain]] = []
        for units, start, back in reversed([*zip(self.chunks, last_s, self.back, strict=True)]):
            if self.policy.overlap_reduce:
                ends = [begin + unit.backward_s for begin, unit in zip(back.begins, units[::-1], strict=True)]
                chains = [unit.moves.reduce_last for unit in reversed(units)]
                issued += [(start + end, chain) for end, chain in zip(ends, chains, strict=True)]
            else:
                issued.append((start + back.end_s, added([unit.moves.reduce_last for unit in units])))
        landed = max(last_s[0] + self.back[0].end_s, *(at + chain_s(chain) for at, chain in issued))
        hops = [(at, _hops(chain)) for at, chain in issued]
        for level in {level for _, each in hops for level in each}:
            using = [(at, each[level]) for at, each in hops if level in each]
            head, done = min(before for _, (before, _, _) in using), 0.0
            for at, (_, inside, _) in using:
                done = max(done, at + head) + inside
            landed = max(landed, done + min(after for _, (_, _, after) in using))
        return landed

    def _whole_s(self, tail_s: float) -> float:
        """Rule 3 for everything from the stage's first pass on."""
        times, units = self.times, [unit for chunk in self.chunks for unit in chunk]
        compute = times * sum(unit.forward_s + unit.backward_s for unit in units)
        idle_s = times * self.waits_s + (times - 1) * self.late_s + tail_s
        return self._shared(compute, self._carried(1 if self.policy.keep_gathered else times), idle_s)

    def _after_s(self, first_s: float) -> float:
        """Streams carry all but the first gathers after the first micro-batch's forward (with chunks, no other gathers)."""
        forward_s = max(first_s + sum(self.passes.forward), self.passes.floor[-1])
        again = len(self.chunks) == 1 and not self.policy.keep_gathered
        carried = self._carried(self.times - 1 if again else 0)
        return forward_s + max((seconds for _, seconds in carried), default=0.0)

    def _carried(self, gathers: int) -> Chain:
        """Seconds by level of the whole step, with so many gathers before forwards."""
        sums: dict[int, float] = {}
        for unit in [unit for chunk in self.chunks for unit in chunk]:
            for chain, often in (
                (unit.moves.gather, gathers),
                (unit.moves.again, 0 if self.policy.keep_gathered else self.times),
                (unit.moves.reduce_each, self.times - 1),
                (unit.moves.reduce_last, 1),
            ):
                for level, seconds in chain:
                    sums[level] = sums.get(level, 0.0) + often * seconds
        return tuple(sums.items())

    def _shared(self, compute_s: float, busy: Chain, idle_s: float) -> float:
        """Rule 3, for streams that are `busy` for so long."""
        busy_s = max((seconds for _, seconds in busy), default=0.0)
        return max(busy_s, compute_s + self.slow * busy_s + (1 - self.slow) * idle_s)


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


def roughly_s(core: Core, kinds: Sequence[StagePasses]) -> float:
    """What a pipeline of these kinds of stages takes at least, without the recurrence.

    A stage waits for the first micro-batch, has all of its passes or messages one after another, and the last backward goes
    back to the first stage. Without chunks the first stage begins micro-batch k + p only after k is back: a window of p
    stages takes a micro-batch's whole way.
    """
    times, send_s, chunks = core.micro_batches, core.send_s, len(kinds[0].forward)
    stages = sum(equal.many for equal in core.stages)
    found, way_s = 0.0, 0.0
    """`way_s`: to a stage and back through first chunks."""
    for passes, equal in zip(kinds, core.stages, strict=True):
        through_s = passes.forward[0] + passes.backward[0] + 2 * send_s
        way_s += (equal.many - 1) * through_s  # the last of its kind has the longest way
        messages = times * (2 * chunks - equal.kind.first - equal.kind.last) if stages > 1 else 0
        sending = passes.forward[0] + messages * send_s - (0.0 if equal.kind.first else send_s)
        found = max(found, way_s + times * passes.work_s, way_s + sending)
        way_s += through_s
    if chunks == 1 and stages > 1:
        windows, rest = divmod(times - 1, stages)
        found = max(found, rest * kinds[0].forward[0] + (windows + 1) * (way_s - 2 * send_s))
    return found


def least_s(setting: Setting, candidate: Candidate, axes: Axes, core: Core) -> float:
    """Seconds that `simulate_step` takes at least."""
    inner = least_inner_s(setting, candidate, axes, core)
    return inner if candidate.sync is None else least_with_rounds(setting, candidate.sync, inner)


def least_inner_s(setting: Setting, candidate: Candidate, axes: Axes, core: Core) -> float:
    """The same without stalls for rounds."""
    slowdown, policy = setting.calibration.overlap_slowdown, overlap_policy(setting, candidate)
    works = stage_work(setting, candidate, axes, core)
    kinds = [StageBound(work, candidate, policy, core.micro_batches, slowdown / (1 + slowdown)) for work in works]
    stages = [stage for stage, work in zip(kinds, works, strict=True) for _ in range(work.equal.many)]
    found = course([stage.passes for stage in stages], micro_batches=core.micro_batches, send_s=core.send_s)
    landed = max(
        stage.landed_s(first, last) for stage, first, last in zip(stages, found.first_s, found.last_s, strict=True)
    )
    return landed + max(optimizer_s(setting, work.owned, axes) + own_once_s(work.units) for work in works)


def least_with_rounds(setting: Setting, sync: CandidateSync, inner: float) -> float:
    """The least step with rounds, if steps without take `inner` seconds at least: stalls fall as steps grow."""
    rounds = outer_round(setting, sync, inner)
    if sync.overlap_steps <= rounds.every_steps:
        return inner + rounds.stall_per_step_s
    return max(inner, rounds.travel_s / sync.overlap_steps)
