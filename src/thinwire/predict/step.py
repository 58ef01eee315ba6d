"""What a step is made of: passes of each stage's units, what moves their states, and the optimizer."""

from dataclasses import dataclass

from thinwire.predict.block import (
    Causes,
    Passes,
    all_reduce_s,
    block_passes,
    embedding_passes,
    gather_s,
    head_passes,
    send_s,
)
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.course import StagePasses
from thinwire.predict.overlap import OverlapPolicy, StageUnits, UnitMoves, UnitWork, grouped, shares
from thinwire.predict.pipeline import EqualStages, StageKind, kinds, message_bytes, parameters_of
from thinwire.predict.placement import Axes, blocks_together, shard_counts, touch_s
from thinwire.predict.sent import unit_moves

OPTIMIZER_BYTES = 30.0
"""Read and written per owned parameter: gradient, master, two moments; master, moments and the new weight."""


@dataclass(frozen=True)
class Core:
    """What does not depend on the partition: passes of a block and the ends, stages, and the pipeline without data."""

    block: Passes
    embedding: Passes
    head: Passes
    stages: tuple[EqualStages, ...]
    micro_batches: int
    send_s: float
    """A message between stages."""

    @property
    def forward_s(self) -> tuple[float, float, float]:
        """Forward of a block, the embedding and the head."""
        return self.block.forward.total, self.embedding.forward.total, self.head.forward.total

    @property
    def backward_s(self) -> tuple[float, float, float]:
        return self.block.backward.total, self.embedding.backward.total, self.head.backward.total


@dataclass(frozen=True)
class StageWork:
    """A kind of stage with everything it does in a step."""

    equal: EqualStages
    passes: Passes
    units: StageUnits
    owned: float
    """Parameters whose optimizer states one rank has."""

    @property
    def once(self) -> Causes:
        """One micro-batch forward and backward, without what moves states."""
        return self.passes.forward.plus(self.passes.backward)


def silent_kinds(core: Core, chunks: int) -> list[StagePasses]:
    """Passes of each kind of stage if nothing moved their states."""
    found = []
    for kind, _, _ in core.stages:
        counts = [
            (count, kind.first and i == 0, kind.last and i == chunks - 1)
            for i, count in enumerate(shares(kind.blocks, chunks))
        ]
        ahead, back = (
            tuple(count * block + first * embedding + last * head for count, first, last in counts)
            for block, embedding, head in (core.forward_s, core.backward_s)
        )
        found.append(StagePasses(ahead, back, (0.0,) * chunks))
    return found


def silent(core: Core, chunks: int) -> list[StagePasses]:
    """The same of every stage."""
    kinds = zip(silent_kinds(core, chunks), core.stages, strict=True)
    return [passes for passes, equal in kinds for _ in range(equal.many)]


def core_of(
    setting: Setting, candidate: Candidate, axes: Axes, passes: tuple[Passes, Passes, Passes] | None = None
) -> Core:
    """The part of a step that all partitions share; `passes` are those of a block, the embedding and the head."""
    block, embedding, head = passes or all_passes(setting, candidate, axes)
    message = send_s(message_bytes(setting, candidate), axes.pipeline)
    if setting.framework.scattered_messages and not setting.framework.sequence_parallel and candidate.pipeline > 1:
        message += gather_s(candidate.tensor * message_bytes(setting, candidate), axes.tensor)
    stages = kinds(setting.spec.layers, candidate.pipeline)
    micro_batches = candidate.accumulate(setting)
    assert micro_batches > 0, "the batch does not divide"
    return Core(block, embedding, head, stages, micro_batches, message)


def all_passes(setting: Setting, candidate: Candidate, axes: Axes) -> tuple[Passes, Passes, Passes]:
    """Passes of a block, the embedding and the head."""
    return (
        block_passes(setting, candidate, axes),
        embedding_passes(setting, candidate, axes),
        head_passes(setting, candidate, axes),
    )


def overlap_policy(setting: Setting, candidate: Candidate) -> OverlapPolicy:
    framework = setting.framework
    return OverlapPolicy(
        framework.prefetch, framework.overlap_reduce, framework.overlap_refresh, candidate.keep_gathered
    )


def stage_work(setting: Setting, candidate: Candidate, axes: Axes, core: Core) -> tuple[StageWork, ...]:
    """Every kind of stage with the moves of its units."""
    parameters = {equal: parameters_of(setting, equal.kind, candidate.tensor) for equal in core.stages}
    resident = setting.spec.tied and candidate.pipeline == 1 and setting.framework.tied_units
    together = blocks_together(setting, candidate, axes.states)
    of_blocks: dict[int, UnitWork] = {}
    found = []
    for equal in core.stages:
        held = parameters[equal]
        moves = {
            name: unit_moves(n, setting, candidate, axes.states, resident=name == "embedding" and resident)
            for name, n in held.items()
            if name != "block"
        }
        groups = grouped(equal.kind.blocks, together)
        for size in groups:
            if size not in of_blocks:
                moving = unit_moves(size * held["block"], setting, candidate, axes.states)
                of_blocks[size] = _unit(core.block, moving, size)
        rest = (of_blocks[groups[0]],) if groups[0] != groups[-1] else ()
        units = StageUnits(
            before=(*((_unit(core.embedding, moves["embedding"]),) if "embedding" in moves else ()), *rest),
            block=of_blocks[groups[-1]],
            blocks=len(groups) - len(rest),
            after=(_unit(core.head, moves.get("head", UnitMoves())),) if equal.kind.last else (),
        )
        full = held["block"] * equal.kind.blocks + held.get("embedding", 0.0) + held.get("head", 0.0)
        passes = pass_causes(equal.kind, core.block, core.embedding, core.head)
        found.append(StageWork(equal, passes, units, full / shard_counts(candidate, axes.states)[2]))
    return tuple(found)


def _unit(passes: Passes, moves: UnitMoves, many: int = 1) -> UnitWork:
    """Of so many passes. Its own work of moving is compute: nothing else goes on in its stream meanwhile."""
    forward_s = many * passes.forward.total + moves.own_forward_s
    return UnitWork(forward_s, many * passes.backward.total + moves.own_backward_s, moves)


def own_once_s(units: StageUnits) -> float:
    """Seconds of a rank's own work of moving that comes once a step."""
    around = sum(unit.moves.own_once_s for unit in (*units.before, *units.after))
    return around + units.blocks * units.block.moves.own_once_s


def optimizer_s(setting: Setting, owned: float, axes: Axes) -> float:
    """Seconds of updating `owned` parameters, with the two small sums over all ranks before it."""
    each = setting.calibration.optimizer_s
    updating = touch_s(OPTIMIZER_BYTES * owned, setting) if each is None else each * owned
    return updating + 2 * all_reduce_s(8.0, axes.states)


def pass_causes(kind: StageKind, block: Passes, embedding: Passes, head: Passes) -> Passes:
    """Forward and backward of a stage for one micro-batch, communication of the data axis left out."""
    forward, backward = Causes(), Causes()
    forward, backward = forward.plus(block.forward, kind.blocks), backward.plus(block.backward, kind.blocks)
    if kind.first:
        forward, backward = forward.plus(embedding.forward), backward.plus(embedding.backward)
    if kind.last:
        forward, backward = forward.plus(head.forward), backward.plus(head.backward)
    return Passes(forward, backward)
