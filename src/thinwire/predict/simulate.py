"""Plays the step program with an event queue: when each operation of each rank begins and ends, in seconds.

Every rank has a compute stream and a send stream for each level. Ranks that do the same are one: a pipeline stage's replicas
are folded into one simulated rank, and only replicas that are slow by name are simulated beside it. Collectives of the
states axis join all simulated replicas of a stage; messages between stages stay inside a replica.

A rank comes to its operations in their order, and waits at each for what that is after; new weights of the step before,
which a gather waits for, hold up the gather alone. What travels between ranks inside a unit's compute, and the small
sums before the update, count in the seconds of those (`predict/block.py`, `predict/step.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from thinwire.files.trace import Span
from thinwire.plan.operations import ALL, Body, Key, Op, Repeat
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.overlap import Chain, added
from thinwire.predict.perturbation import Jitter, Perturbation
from thinwire.predict.placement import Axes
from thinwire.predict.planned import planned
from thinwire.predict.queue import Clock, Message, SendStream, Signal, Worker, chain
from thinwire.predict.step import StageWork, core_of, optimizer_s, own_once_s, stage_work

Waits = Iterator[Signal]


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


Step = tuple[Op, int, int]
"""An operation, and by how much the numbers of its micro-batch and of its units are more than it says."""


def _steps(body: Body, micro_batches: int, units: int) -> Iterator[Step]:
    """As `RankClass.ops`, but nothing is made anew: most of what a rank comes to it only computes."""
    for item in body:
        if isinstance(item, Op):
            yield item, micro_batches, units
            continue
        for time in range(item.times):
            yield from _steps(item.body, micro_batches + time * item.micro_batches, units + time * item.units)


class Costs:
    """Seconds of a rank class's operations."""

    def __init__(self, setting: Setting, candidate: Candidate, axes: Axes, work: StageWork, body: Body) -> None:
        self._units = [unit for chunk in work.units.chunked(candidate.chunks) for unit in chunk]
        self.update_s = optimizer_s(setting, work.owned, axes) + own_once_s(work.units)
        self._body = self._timed(body)
        self._forward_s = [unit.forward_s for unit in self._units]
        self._backward_s = [unit.backward_s for unit in self._units]

    @property
    def ops(self) -> Iterator[Step]:
        """Of the program, in its order, what takes time or is waited for."""
        return _steps(self._body, 0, 0)

    def compute_s(self, op: Op, units: int) -> float:
        """Of an operation whose units' numbers are so many more."""
        seconds = self._forward_s if op.key.role == "forward" else self._backward_s
        return sum([seconds[unit + units] for unit in op.units]) if op.units else seconds[op.key.unit + units]

    def _timed(self, body: Body) -> Body:
        """What takes time, or is waited for; units that compute one after another in one operation."""
        return tuple(self._kept(body))

    def _kept(self, body: Body) -> Iterator[Op | Repeat]:
        for item in body:
            if isinstance(item, Repeat):
                inner = self._timed(item.body)
                plain = [each for each in inner if isinstance(each, Op) and each.kind == "compute" and not each.after]
                if item.units and inner and len(plain) == len(inner):
                    shifts = (time * item.units for time in range(item.times))
                    units = tuple(unit + shift for shift in shifts for op in plain for unit in op.of_units)
                    yield plain[0]._replace(units=units)
                elif inner:
                    yield item._replace(body=inner)
                continue
            op = item._replace(after=tuple(key for key in item.after if self._takes_time(key)))
            moves = op.key.role in ("gather", "reduce") and self.chain(op, last=True)
            if moves or op.after or op.kind in ("compute", "transfer", "update") or op.key.role == "flags":
                yield op

    def _takes_time(self, key: Key) -> bool:
        """Whether what others are after can still be on its way."""
        if key.role == "gather":
            moves = self._units[key.unit].moves
            return bool(moves.gather if key.phase == "forward" else moves.again)
        return key.role in ("send", "reduce") or (key.role == "refresh" and bool(self._units[key.unit].moves.refresh))

    def chain(self, op: Op, *, last: bool) -> Chain:
        """Of a collective that moves states, seconds of its hops behind compute; of several units together added up."""
        role, phase = op.key.role, op.key.phase
        moves = [self._units[unit].moves for unit in op.of_units]
        if role == "gather":
            chains = [each.gather if phase == "forward" else each.again for each in moves]
        elif role == "reduce":
            chains = [each.reduce_last if last else each.reduce_each for each in moves]
        else:
            chains = [each.refresh for each in moves]
        return chains[0] if len(chains) == 1 else added(chains)


class Play:
    """All simulated ranks of a step, and what they share."""

    def __init__(
        self, setting: Setting, candidate: Candidate, axes: Axes, perturbation: Perturbation, *, keep_spans: bool
    ) -> None:
        self.setting, self.candidate, self.axes, self.perturbation = setting, candidate, axes, perturbation
        self.clock = Clock()
        self.spans: list[Span] = []
        self.busy: dict[str, float] = {}
        self._keep = keep_spans
        core = core_of(setting, candidate, axes)
        self.send_s = core.send_s
        self.micro_batches = core.micro_batches
        self.classes = planned(setting, candidate, axes).classes
        works = stage_work(setting, candidate, axes, core)
        of_stages = [work for work in works for _ in range(work.equal.many)]
        self.costs = [
            Costs(setting, candidate, axes, work, each.body) for work, each in zip(of_stages, self.classes, strict=True)
        ]
        self.replicas = sorted({-1, *(replica for replica, _ in perturbation.slow_ranks)})
        """Replica -1 stands for all that are as computed."""
        self._collectives: dict[tuple[int, Key], list[Message]] = {}
        self._sends: dict[tuple[int, Key], Signal] = {}
        self.ranks = [Rank(self, replica, stage) for replica in self.replicas for stage in range(candidate.pipeline)]
        self._waiting = len(self.ranks)
        self.all_landed = Signal()

    def log(self, span: Span) -> None:
        stream = f"{span.rank}:{span.lane}"
        self.busy[stream] = self.busy.get(stream, 0.0) + span.end_s - span.start_s
        if self._keep:
            self.spans.append(span)

    def collective(self, stage: int, key: Key, label: str, hops: Chain) -> list[Message]:
        """The messages of a collective that every replica of `stage` comes to."""
        if (stage, key) not in self._collectives:
            slow = self.perturbation.slow_levels
            self._collectives[stage, key] = [
                Message(label, seconds * slow.get(level, 1.0), [], len(self.replicas)) for level, seconds in hops
            ]
        return self._collectives[stage, key]

    def sent(self, replica: int, key: Key) -> Signal:
        """Fires when what `key` sends has arrived."""
        return self._sends.setdefault((replica, key), Signal())

    def landed(self) -> None:
        """A rank's gradients are there; the optimizer waits for everyone's."""
        self._waiting -= 1
        if self._waiting == 0:
            self.all_landed.fire()

    def run(self) -> float:
        for rank in self.ranks:
            rank.start()
        end_s = self.clock.run()
        assert all(rank.ended for rank in self.ranks), "ranks wait for each other"
        return end_s


class Rank:
    """One simulated rank, and where it stands in its program."""

    def __init__(self, play: Play, replica: int, stage: int) -> None:
        self._play, self.replica, self.stage = play, replica, stage
        candidate, setting = play.candidate, play.setting
        number = play.replicas.index(replica) * candidate.pipeline + stage
        self._class, self._costs = play.classes[stage], play.costs[stage]
        self._worker = Worker(play.clock, number, setting.calibration.overlap_slowdown, play.log)
        names = setting.cluster.level_names
        self._streams = [SendStream(play.clock, number, name, self._worker, play.log) for name in names]
        self._pipe = [SendStream(play.clock, number, f"{name} pipeline", None, play.log) for name in names]
        many = 1 if replica >= 0 else max(1, candidate.data(setting.cluster) * candidate.tensor * candidate.context)
        self._jitter = Jitter(play.perturbation, number, many)
        self._slow = play.perturbation.slow_ranks.get((replica, stage), 1.0)
        self._arrived: dict[Key, Signal] = {}
        """Of collectives that take time behind compute, by what they are."""
        self.ended = False
        self._story = self._steps()

    def start(self) -> None:
        self._play.clock.at(0.0, self._advance)

    def _advance(self) -> None:
        for signal in self._story:
            if not signal.done:
                signal.then(self._advance)
                return

    # -- its operations ------------------------------------------------------------------------------------------------

    def _steps(self) -> Waits:
        for op in self._class.ops():
            if op.key.role == "refresh":  # of the step before: it is on its way when this one begins
                self._collective(op._replace(key=op.key._replace(step=-1)))
        computing: list[Step] = []
        """What the rank computes in one go: nothing comes between."""
        for step in self._costs.ops:
            op, micro_batches, units = step
            waits = self._waits(step) if op.after else ()
            if computing and (waits or op.kind != "compute" or not _one_pass(step, computing[0])):
                yield self._compute(computing)
                computing = []
            yield from waits
            if op.kind == "compute":
                computing.append(step)
            elif op.kind == "update":
                yield self._play.all_landed
                yield self._work("optimizer", self._costs.update_s)
                self.ended = True
                return
            elif op.kind == "transfer":
                self._send(op.moved(micro_batches, units))
            elif op.key.role in ("gather", "reduce"):
                self._collective(op.moved(micro_batches, units))
            elif op.key.role == "flags":
                self._play.landed()

    def _waits(self, step: Step) -> list[Signal]:
        """What an operation is after, and has not come yet."""
        op, micro_batches, units = step
        found = []
        for each in op.after:
            key = each.moved(micro_batches, units) if micro_batches or units else each
            if key.role == "send":
                found.append(self._play.sent(self.replica, key))
            elif key.role == "reduce" and ALL in key:
                found += [signal for other, signal in self._arrived.items() if other.role == "reduce"]
            elif key in self._arrived and not (op.key.role == "gather" and key.step < 0):
                found.append(self._arrived[key])
        return [signal for signal in found if not signal.done]

    def _collective(self, op: Op) -> None:
        """Come to a collective now, or once the new weights are there that it gathers."""
        hops = self._costs.chain(op, last=op.key.micro_batch == self._play.micro_batches - 1)
        if not hops:
            return
        done = self._arrived[op.key] = Signal()
        first = self._class.units[op.key.unit].name
        label = f"{op.key.role} {first}" if op.key.micro_batch < 0 else f"{op.key.role} {first} {op.key.micro_batch}"
        messages = self._play.collective(self.stage, op.key, label, hops)
        streams = [self._streams[level] for level, _ in hops]
        pending = [self._arrived[key] for key in op.after if key.step < 0 and key in self._arrived]
        if pending:
            pending[0].then(lambda: chain(messages, streams, done))
        else:
            chain(messages, streams, done)

    def _send(self, op: Op) -> None:
        """A pass's output to the stage that waits for it."""
        play, signal = self._play, self._play.sent(self.replica, op.key)
        if not op.hops:
            signal.fire()
            return
        level = op.hops[0].level
        seconds = play.send_s * play.perturbation.slow_levels.get(level, 1.0)
        message = Message(f"send {op.key.phase} {op.key.micro_batch}", seconds, [], 1)
        message.done.then(signal.fire)
        self._pipe[level].join(message)

    def _compute(self, steps: list[Step]) -> Signal:
        (first, micro_batches, units), seconds = steps[0], sum([self._costs.compute_s(op, u) for op, _, u in steps])
        alone = len(steps) == len(first.of_units) == 1
        named = f" {self._class.units[first.key.unit + units].name}" if alone else ""
        return self._work(f"{first.key.phase} {first.key.micro_batch + micro_batches}{named}", seconds)

    def _work(self, name: str, seconds: float) -> Signal:
        done = Signal()
        self._worker.compute(name, seconds * self._slow * self._jitter.factor(), done.fire)
        return done


def _one_pass(one: Step, other: Step) -> bool:
    """Whether two operations compute in the same pass."""
    (op, more, _), (op2, more2, _) = one, other
    return op.key.phase == op2.key.phase and op.key.micro_batch + more == op2.key.micro_batch + more2


def simulate_step(
    setting: Setting,
    candidate: Candidate,
    axes: Axes,
    perturbation: Perturbation | None = None,
    *,
    keep_spans: bool = True,
) -> Simulated:
    """Play one step: its seconds, a step's share of the rounds' stalls among them. Raises PlanError for low-rank sums."""
    play = Play(setting, candidate, axes, perturbation or Perturbation(), keep_spans=keep_spans)
    seconds = play.run()
    outer = outer_round(setting, candidate.sync, seconds).stall_per_step_s if candidate.sync else 0.0
    names = tuple(
        f"stage {rank.stage}" + ("" if rank.replica < 0 else f", replica {rank.replica}") for rank in play.ranks
    )
    return Simulated(seconds + outer, outer, tuple(play.spans), names, play.clock.events, play.busy)
