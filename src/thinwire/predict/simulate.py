"""One optimizer step simulated with an event queue, from the same costs as the closed form.

Every rank has a compute stream and a send stream for each level. Ranks that do the same are one: a pipeline stage's replicas
are folded into one simulated rank, and only replicas that are slow by name are simulated beside it. Collectives of the
states axis join all simulated replicas of a stage; messages between stages stay inside a replica.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from thinwire.files.trace import Span
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.overlap import Chain, OverlapPolicy, StageUnits, UnitWork, added
from thinwire.predict.perturbation import Jitter, Perturbation
from thinwire.predict.placement import Axes
from thinwire.predict.queue import Clock, Message, Pass, SendStream, Signal, Worker, before, chain, passes
from thinwire.predict.step import core_of, optimizer_s, overlap_policy, own_once_s, stage_work

Program = Iterator[Signal]


@dataclass(frozen=True)
class Simulated:
    """What came of it."""

    step_s: float
    outer_s: float
    """Stalls for outer rounds, in the mean; part of `step_s`."""
    spans: tuple[Span, ...]
    ranks: tuple[str, ...]
    """Names of the simulated ranks."""
    events: int
    busy_s: dict[str, float]
    """Seconds that each stream was busy, over all simulated ranks."""


class Step:
    """The world of one step."""

    def __init__(
        self, setting: Setting, candidate: Candidate, axes: Axes, perturbation: Perturbation, *, keep_spans: bool
    ) -> None:
        self.setting, self.candidate, self.axes, self.perturbation = setting, candidate, axes, perturbation
        self.clock = Clock()
        self.spans: list[Span] = []
        self.busy: dict[str, float] = {}
        self._keep = keep_spans
        self.core = core_of(setting, candidate, axes)
        self.works = {
            index: work
            for work in stage_work(setting, candidate, axes, self.core)
            for index in range(work.equal.first, work.equal.first + work.equal.many)
        }
        self.replicas = sorted({-1, *(replica for replica, _ in perturbation.slow_ranks)})
        """Replica -1 stands for all that are as computed."""
        self._collectives: dict[tuple[object, ...], list[Message]] = {}
        self._arrivals: dict[tuple[object, ...], Signal] = {}
        self.actors = [Actor(self, replica, stage) for replica in self.replicas for stage in range(candidate.pipeline)]
        self._waiting = len(self.actors)
        self.all_landed = Signal()

    def log(self, span: Span) -> None:
        stream = f"{span.rank}:{span.lane}"
        self.busy[stream] = self.busy.get(stream, 0.0) + span.end_s - span.start_s
        if self._keep:
            self.spans.append(span)

    def collective(self, stage: int, key: tuple[object, ...], hops: Chain) -> list[Message]:
        """The messages of a collective that every replica of `stage` comes to."""
        name = (stage, *key)
        if name not in self._collectives:
            slow = self.perturbation.slow_levels
            label = " ".join(str(part) for part in key)
            self._collectives[name] = [
                Message(label, seconds * slow.get(level, 1.0), [], len(self.replicas)) for level, seconds in hops
            ]
        return self._collectives[name]

    def arrival(self, replica: int, stage: int, each: Pass) -> Signal:
        """Fires when what the pass `each` of a stage needs from elsewhere has arrived."""
        return self._arrivals.setdefault((replica, stage, each), Signal())

    def landed(self) -> None:
        """A rank's gradients are there; the optimizer waits for everyone's."""
        self._waiting -= 1
        if self._waiting == 0:
            self.all_landed.fire()

    def run(self) -> float:
        for actor in self.actors:
            actor.start()
        return self.clock.run()


class Actor:
    """One simulated rank: its program, and where it stands in it."""

    def __init__(self, step: Step, replica: int, stage: int) -> None:
        self.step, self.replica, self.stage = step, replica, stage
        candidate = step.candidate
        self.rank = step.replicas.index(replica) * candidate.pipeline + stage
        self.work = step.works[stage]
        self.policy: OverlapPolicy = overlap_policy(step.setting, candidate)
        self.worker = Worker(step.clock, self.rank, step.setting.calibration.overlap_slowdown, step.log)
        names = step.setting.cluster.level_names
        self.streams = [SendStream(step.clock, self.rank, name, self.worker, step.log) for name in names]
        self.pipe = [SendStream(step.clock, self.rank, f"{name} pipeline", None, step.log) for name in names]
        many = (
            1 if replica >= 0 else max(1, candidate.data(step.setting.cluster) * candidate.tensor * candidate.context)
        )
        self.jitter = Jitter(step.perturbation, self.rank, many)
        self.slow = step.perturbation.slow_ranks.get((replica, stage), 1.0)
        self.refreshed: dict[int, Signal] = {}
        self._program = self._story()

    def start(self) -> None:
        self.step.clock.at(0.0, self._advance)

    def _advance(self) -> None:
        for signal in self._program:
            if not signal.done:
                signal.then(self._advance)
                return

    # -- the program of a rank -------------------------------------------------------------------------------------------

    def _story(self) -> Program:
        units = self._chunks()
        self._refresh([unit for chunk in units for unit in chunk])
        candidate, micro_batches = self.step.candidate, self.step.core.micro_batches
        reduced: list[Signal] = []
        last_of_chunk = [micro_batches - 1] * candidate.chunks
        for each in passes(self.stage, candidate.pipeline, micro_batches, candidate.chunks):
            if before(each, self.stage, candidate.pipeline, candidate.chunks) is not None:
                yield self.step.arrival(self.replica, self.stage, each)
            if each.forward:
                yield from self._forward(each, units[each.chunk], offset=sum(len(u) for u in units[: each.chunk]))
            else:
                last = each.micro_batch == last_of_chunk[each.chunk]
                yield from self._backward(each, units[each.chunk], last, reduced)
            self._send_on(each)
        yield from reduced
        self.step.landed()
        yield self.step.all_landed
        yield self._compute("optimizer", self._optimizer_s())

    def _chunks(self) -> list[list[UnitWork]]:
        """The stage's units, chunk by chunk; the first chunk has the embedding, the last one the head."""
        units: StageUnits = self.work.units
        chunks = self.step.candidate.chunks
        share = [units.blocks // chunks + (i < units.blocks % chunks) for i in range(chunks)]
        found = [[units.block] * count for count in share]
        found[0] = [*units.before, *found[0]]
        found[-1] = [*found[-1], *units.after]
        return found

    def _refresh(self, units: list[UnitWork]) -> None:
        """New weights set out at the start, in forward order."""
        if self.policy.overlap_refresh:
            for index, unit in enumerate(units):
                if unit.moves.refresh:
                    self.refreshed[index] = self._collective(("refresh", index), unit.moves.refresh)
            return
        together = added([unit.moves.refresh for unit in units])
        if together:
            signal = self._collective(("refresh",), together)
            self.refreshed = dict.fromkeys(range(len(units)), signal)

    def _forward(self, each: Pass, units: list[UnitWork], *, offset: int) -> Program:
        first = each.micro_batch == 0
        gathers = first or not self.policy.keep_gathered
        if not first and not (gathers and any(unit.moves.gather for unit in units)):
            yield self._compute(_name(each), sum(unit.forward_s for unit in units))
            return
        arrive: Signal | None = None
        for index, unit in enumerate(units):
            refreshed = self.refreshed.get(offset + index) if first else None
            if refreshed is not None:
                yield refreshed
            if unit.moves.gather:
                yield arrive or self._collective(("gather", *each, index), unit.moves.gather)
            arrive = None
            following = index + 1 < len(units) and bool(units[index + 1].moves.gather)
            pending = self.refreshed.get(offset + index + 1) if first else None
            if following and self.policy.prefetch:
                arrive = self._collective(("gather", *each, index + 1), units[index + 1].moves.gather, after=pending)
            yield self._compute(f"{_name(each)} unit {index}", unit.forward_s)

    def _backward(self, each: Pass, units: list[UnitWork], last: bool, reduced: list[Signal]) -> Program:
        gathers = not self.policy.keep_gathered and any(unit.moves.again for unit in units)
        quiet = not gathers and not any(self._sent(unit, last) for unit in units)
        if quiet:
            yield self._compute(_name(each), sum(unit.backward_s for unit in units))
            return
        late: list[Chain] = []
        arrive: Signal | None = None
        for index in reversed(range(len(units))):
            unit = units[index]
            if gathers and unit.moves.again:
                yield arrive or self._collective(("gather", *each, index), unit.moves.again)
            arrive = None
            if gathers and self.policy.prefetch and index > 0 and units[index - 1].moves.again:
                arrive = self._collective(("gather", *each, index - 1), units[index - 1].moves.again)
            yield self._compute(f"{_name(each)} unit {index}", unit.backward_s)
            sent = self._sent(unit, last)
            if sent and self.policy.overlap_reduce:
                reduced.append(self._collective(("reduce", *each, index), sent))
            elif sent:
                late.append(sent)
        if late and last:
            reduced.append(self._collective(("reduce", *each), added(late)))
        elif late:
            yield self._collective(("reduce", *each), added(late))

    def _sent(self, unit: UnitWork, last: bool) -> Chain:
        return unit.moves.reduce_last if last else unit.moves.reduce_each

    # -- what it does --------------------------------------------------------------------------------------------------

    def _compute(self, name: str, seconds: float) -> Signal:
        done = Signal()
        self.worker.compute(name, seconds * self.slow * self.jitter.factor(), done.fire)
        return done

    def _collective(self, key: tuple[object, ...], hops: Chain, after: Signal | None = None) -> Signal:
        """Come to a collective now, or once `after` has fired."""
        done = Signal()
        messages = self.step.collective(self.stage, key, hops)
        streams = [self.streams[level] for level, _ in hops]

        def come() -> None:
            chain(messages, streams, done)

        if after is None:
            come()
        else:
            after.then(come)
        return done

    def _send_on(self, each: Pass) -> None:
        """Send a pass's output to the stage that waits for it."""
        step, candidate = self.step, self.step.candidate
        after = _after(each, self.stage, candidate.pipeline, candidate.chunks)
        if after is None:
            return
        stage, waiting = after
        signal = step.arrival(self.replica, stage, waiting)
        if not step.axes.pipeline:
            signal.fire()
            return
        level = step.axes.pipeline[-1].level
        seconds = step.core.send_s * step.perturbation.slow_levels.get(level, 1.0)
        message = Message(f"send {_name(each)}", seconds, [], 1)
        message.done.then(signal.fire)
        self.pipe[level].join(message)

    def _optimizer_s(self) -> float:
        updating = optimizer_s(self.step.setting, self.work.owned, self.step.axes)
        return updating + own_once_s(self.work.units)


def _after(each: Pass, stage: int, stages: int, chunks: int) -> tuple[int, Pass] | None:
    """The (stage, pass) that needs the output of `each`: the mirror of `before`."""
    step = 1 if each.forward else -1
    adjacent, chunk = stage + step, each.chunk
    if not 0 <= adjacent < stages:
        chunk, adjacent = chunk + step, adjacent % stages
    if not 0 <= chunk < chunks:
        return None
    return adjacent, Pass(each.forward, each.micro_batch, chunk)


def _name(each: Pass) -> str:
    chunk = f".{each.chunk}" if each.chunk else ""
    return f"{'forward' if each.forward else 'backward'} {each.micro_batch}{chunk}"


def simulate_step(
    setting: Setting,
    candidate: Candidate,
    axes: Axes,
    perturbation: Perturbation | None = None,
    *,
    keep_spans: bool = True,
) -> Simulated:
    """Simulate one step."""
    step = Step(setting, candidate, axes, perturbation or Perturbation(), keep_spans=keep_spans)
    seconds = step.run()
    outer = outer_round(setting, candidate.sync, seconds).stall_per_step_s if candidate.sync else 0.0
    names = tuple(
        f"stage {actor.stage}" + ("" if actor.replica < 0 else f", replica {actor.replica}") for actor in step.actors
    )
    return Simulated(seconds + outer, outer, tuple(step.spans), names, step.clock.events, step.busy)


def step_s(setting: Setting, candidate: Candidate, axes: Axes) -> float:
    """Seconds of a simulated step: what finalists are ranked with."""
    return simulate_step(setting, candidate, axes, keep_spans=False).step_s
