"""Seconds of one optimizer step by cause: the closed form that the planner ranks with.

The causes add up to the step: work of the busiest stage by kind, what of each communication nothing hides, waiting for
other stages, the optimizer, and what an outer round adds in the mean. What is hidden stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.predict.block import Causes, Passes, all_reduce_s, block_passes, embedding_passes, head_passes, send_s
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.overlap import OverlapPolicy, StageUnits, SteadyState, UnitMoves, UnitWork, steady_state
from thinwire.predict.pipeline import (
    EqualStages,
    PipelineTime,
    StageKind,
    kinds,
    message_bytes,
    parameters_of,
    pipeline_time,
)
from thinwire.predict.placement import Axes, shard_counts, touch_s
from thinwire.predict.sent import unit_moves

OPTIMIZER_BYTES = 30.0
"""Read and written per owned parameter: gradient, master, two moments; master, moments and the new weight."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by cause. All but `hidden_s` add up to `total`."""

    matmul_s: float
    memory_s: float
    launch_s: float
    tensor_s: float
    context_s: float
    data_s: float
    """Collectives of the data axis that nothing hides, and compute's slowing down beside the hidden ones."""
    bubble_s: float
    send_s: float
    """Waiting for messages between pipeline stages."""
    optimizer_s: float
    outer_s: float
    """Stalls for outer rounds, spread over the steps between them."""
    hidden_s: float
    """Collectives that run behind compute."""

    @property
    def total(self) -> float:
        return (
            self.compute_s + self.tensor_s + self.context_s + self.data_s + self.bubble_s + self.send_s + self.optimizer_s
            + self.outer_s
        )  # fmt: skip

    @property
    def compute_s(self) -> float:
        return self.matmul_s + self.memory_s + self.launch_s


@dataclass(frozen=True)
class Core:
    """What does not depend on the partition: passes of a block and the ends, stages, and the pipeline without data."""

    block: Passes
    embedding: Passes
    head: Passes
    stages: tuple[EqualStages, ...]
    micro_batches: int
    send_s: float
    alone: PipelineTime

    @property
    def least_s(self) -> float:
        """A lower bound of the step."""
        return self.alone.total


@dataclass(frozen=True)
class StageWork:
    """A kind of stage with everything it does in a step."""

    equal: EqualStages
    passes: Passes
    units: StageUnits
    steady: SteadyState
    owned: float
    """Parameters whose optimizer states one rank has."""


def core_of(
    setting: Setting, candidate: Candidate, axes: Axes, passes: tuple[Passes, Passes, Passes] | None = None
) -> Core:
    """The part of a step that all partitions share; `passes` are those of a block, the embedding and the head."""
    block, embedding, head = passes or all_passes(setting, candidate, axes)
    alone = pipeline_alone(setting, candidate, axes, (block, embedding, head))
    message = send_s(message_bytes(setting, candidate), axes.pipeline)
    stages = kinds(setting.spec.layers, candidate.pipeline)
    return Core(block, embedding, head, stages, candidate.accumulate(setting), message, alone)


def all_passes(setting: Setting, candidate: Candidate, axes: Axes) -> tuple[Passes, Passes, Passes]:
    """Passes of a block, the embedding and the head."""
    return (
        block_passes(setting, candidate, axes),
        embedding_passes(setting, candidate, axes),
        head_passes(setting, candidate, axes),
    )


def pipeline_alone(
    setting: Setting, candidate: Candidate, axes: Axes, passes: tuple[Passes, Passes, Passes]
) -> PipelineTime:
    """The pipeline without any communication of the states axis: a lower bound of the step."""
    micro_batches = candidate.accumulate(setting)
    assert micro_batches > 0, "the batch does not divide"
    block, embedding, head = (each.forward.total + each.backward.total for each in passes)
    totals = [
        (kind.blocks * block + kind.first * embedding + kind.last * head, count)
        for kind, count, _ in kinds(setting.spec.layers, candidate.pipeline)
    ]
    message = send_s(message_bytes(setting, candidate), axes.pipeline)
    return pipeline_time(totals, micro_batches=micro_batches, chunks=candidate.chunks, send_s=message)


def overlap_policy(setting: Setting, candidate: Candidate) -> OverlapPolicy:
    framework = setting.framework
    return OverlapPolicy(
        framework.prefetch, framework.overlap_reduce, framework.overlap_refresh, candidate.keep_gathered
    )


def stage_work(setting: Setting, candidate: Candidate, axes: Axes, core: Core) -> tuple[StageWork, ...]:
    """Every kind of stage with the moves of its units."""
    parameters = {equal: parameters_of(setting, equal.kind, candidate.tensor) for equal in core.stages}
    resident = setting.spec.tied and candidate.pipeline == 1 and setting.framework.tied_units
    block_moves = unit_moves(parameters[core.stages[0]]["block"], setting, candidate, axes.states)
    found = []
    for equal in core.stages:
        held = parameters[equal]
        moves = {
            name: unit_moves(n, setting, candidate, axes.states, resident=name == "embedding" and resident)
            for name, n in held.items()
            if name != "block"
        }
        units = StageUnits(
            before=(_unit(core.embedding, moves["embedding"]),) if "embedding" in moves else (),
            block=_unit(core.block, block_moves),
            blocks=equal.kind.blocks,
            after=(_unit(core.head, moves.get("head", UnitMoves())),) if equal.kind.last else (),
        )
        steady = steady_state(
            units,
            overlap_policy(setting, candidate),
            micro_batches=core.micro_batches,
            slowdown=setting.calibration.overlap_slowdown,
        )
        full = held["block"] * equal.kind.blocks + held.get("embedding", 0.0) + held.get("head", 0.0)
        passes = pass_causes(equal.kind, core.block, core.embedding, core.head)
        found.append(StageWork(equal, passes, units, steady, full / shard_counts(candidate, axes.states)[2]))
    return tuple(found)


def _unit(passes: Passes, moves: UnitMoves) -> UnitWork:
    """Its own work of moving is compute: nothing else goes on in its stream meanwhile."""
    forward_s = passes.forward.total + moves.own_forward_s
    return UnitWork(forward_s, passes.backward.total + moves.own_backward_s, moves)


def own_once_s(units: StageUnits) -> float:
    """Seconds of a rank's own work of moving that comes once a step."""
    around = sum(unit.moves.own_once_s for unit in (*units.before, *units.after))
    return around + units.blocks * units.block.moves.own_once_s


def optimizer_s(setting: Setting, owned: float, axes: Axes) -> float:
    """Seconds of updating `owned` parameters, with the two small sums over all ranks before it."""
    each = setting.calibration.optimizer_s
    updating = touch_s(OPTIMIZER_BYTES * owned, setting) if each is None else each * owned
    return updating + 2 * all_reduce_s(8.0, axes.states)


def step_time(setting: Setting, candidate: Candidate, axes: Axes, core: Core | None = None) -> StepTime:
    """Seconds of one step by cause."""
    core = core or core_of(setting, candidate, axes)
    works = stage_work(setting, candidate, axes, core)
    busiest = max(works, key=lambda work: work.steady.middle_s)
    pipeline = pipeline_time(
        [(work.steady.middle_s, work.equal.many) for work in works],
        micro_batches=core.micro_batches,
        chunks=candidate.chunks,
        send_s=core.send_s,
    )
    ends = ends_s(works, core.micro_batches)
    optimizer = optimizer_s(setting, max(work.owned for work in works), axes)
    ends += max(own_once_s(work.units) for work in works)
    once = busiest.passes.forward.plus(busiest.passes.backward)
    work_s = once.total * core.micro_batches
    data = pipeline.busiest_s - work_s + ends
    inner = pipeline.total + ends + optimizer
    outer = outer_round(setting, candidate.sync, inner).stall_per_step_s if candidate.sync else 0.0
    return _named(once, core.micro_batches, pipeline, data, optimizer, outer, busiest.steady)


def ends_s(works: Sequence[StageWork], micro_batches: int) -> float:
    """By how much the first and the last micro-batch are longer than the others, and the last gradients' way.

    The last backward goes through every stage, one after another, and is longer in each. The first forward is longer in
    the first stage only: new weights reach the others while they wait for it.
    """
    tail, ahead = 0.0, 0.0
    for work in works:  # a later stage ends its backward before the earlier ones begin theirs
        tail = max(tail, work.steady.tail_s - ahead)
        ahead += work.equal.many * work.steady.middle_s * (1 - work.steady.forward_share)
    if micro_batches == 1:
        return tail
    first = max(work.steady.first_s - work.steady.middle_s for work in works)
    last = sum(work.equal.many * (work.steady.last_s - work.steady.middle_s) for work in works)
    return first + last + tail


def _named(
    once: Causes, times: int, pipeline: PipelineTime, data: float, optimizer: float, outer: float, steady: SteadyState
) -> StepTime:
    return StepTime(
        matmul_s=once.matmul_s * times,
        memory_s=once.memory_s * times,
        launch_s=once.launch_s * times,
        tensor_s=once.tensor_s * times,
        context_s=once.context_s * times,
        data_s=data,
        bubble_s=pipeline.bubble_s,
        send_s=pipeline.send_s,
        optimizer_s=optimizer,
        outer_s=outer,
        hidden_s=max(0.0, steady.sent_s - (data - steady.stretched_s)),
    )


def pass_causes(kind: StageKind, block: Passes, embedding: Passes, head: Passes) -> Passes:
    """Forward and backward of a stage for one micro-batch, communication of the data axis left out."""
    forward, backward = Causes(), Causes()
    forward, backward = forward.plus(block.forward, kind.blocks), backward.plus(block.backward, kind.blocks)
    if kind.first:
        forward, backward = forward.plus(embedding.forward), backward.plus(embedding.backward)
    if kind.last:
        forward, backward = forward.plus(head.forward), backward.plus(head.backward)
    return Passes(forward, backward)
