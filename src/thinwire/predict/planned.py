"""The step program of a candidate: the units of its stages as the engine would find them, and what a rank sends.

Units are a block, or blocks that travel together, the embedding with positions, and the head with the final norm. Their
buffers are the model's own units, padded as the engine pads them. A level that the data axis does not cross does not
count: depths are translated to hops of that axis.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from thinwire.plan.hops import Hop, Link
from thinwire.plan.operations import Program, Unit
from thinwire.plan.program import VOTE_EVERY, Overlap, StepShape, Where, program
from thinwire.plan.rounds import HEARTBEAT_BYTES, assign_units, exchange_bytes, inside_bytes, swaps
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.overlap import grouped, shares
from thinwire.predict.pipeline import StageKind, kinds, message_bytes, parameters_of
from thinwire.predict.placement import Axes, blocks_together, bucket_of, buffer_of, hop_depths, links_of


def stage_units(setting: Setting, candidate: Candidate, axes: Axes, stage: int) -> list[list[Unit]]:
    """The units of each chunk of a stage, in forward order; the first chunk has the embedding, the last one the head."""
    inside = (
        tuple(activation_hops(setting, candidate, axes)),
        tuple(activation_hops(setting, candidate, axes, back=True)),
    )
    resident = setting.spec.tied and candidate.pipeline == 1 and setting.framework.tied_units
    kind, first = _kind(setting.spec.layers, candidate.pipeline, stage)
    ends = _ends(setting, candidate, kind)

    def unit(name: str, members: Sequence[Member], *hops: tuple[Hop, ...]) -> Unit:
        buffers = (buffer_of(n, setting, candidate, axes.states, parameters=many) for n, many in members)
        return Unit(name, tuple(buffers), name == "embedding" and resident, *hops)

    many = next(len(each.parameters) for each in setting.spec.units() if each.name == "blocks.0")
    block = (setting.block_parameters / candidate.tensor, many)
    together = blocks_together(setting, candidate, axes.states)
    found = []
    for count in shares(kind.blocks, candidate.chunks):
        chunk = []
        for size in grouped(count, together):
            name = f"blocks.{first}" + (f" to blocks.{first + size - 1}" if size > 1 else "")
            chunk.append(unit(name, [block] * size, *(hops * size for hops in inside)))
            first += size
        found.append(chunk)
    found[0] = [*([unit("embedding", ends["embedding"])] if "embedding" in ends else []), *found[0]]
    found[-1] = [*found[-1], *([unit("head", ends["head"])] if "head" in ends else [])]
    return found


Member = tuple[float, int]
"""Elements of a flat buffer, and how many parameters lie in it."""


def _ends(setting: Setting, candidate: Candidate, kind: StageKind) -> dict[str, list[Member]]:
    """What a stage has besides its blocks: the embedding with positions, the head with the final norm."""
    spec, tensor = setting.spec, candidate.tensor
    shapes = spec.parameter_shapes()
    members = {
        unit.name: (sum(math.prod(shapes[name]) for name in unit.parameters) / tensor, len(unit.parameters))
        for unit in spec.units()
    }
    found: dict[str, list[Member]] = {}
    if candidate.pipeline > 1:  # a table of its own at both ends, and the norm with the last one
        held = parameters_of(setting, kind, tensor)
        return {name: [(held[name], members["norm"][1] + 1)] for name in ("embedding", "head") if name in held}
    found["embedding"] = [members[name] for name in ("embedding", "positions") if name in members]
    found["head"] = [members[name] for name in ("norm", "head") if name in members]
    return found


def activation_hops(setting: Setting, candidate: Candidate, axes: Axes, *, back: bool = False) -> Iterator[Hop]:
    """What tensor and context ranks send each other inside a block's forward, or (`back`) its backward.

    Two all-reduces of the tensor axis a pass (Megatron-LM, arXiv 1909.08053), each a reduce-scatter and its mirror; keys and
    values of every other part of the sequence once, with their gradients in backward. Full recompute is a forward more.
    """
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    again = back and candidate.recompute == "full"
    moved, inner = round(tokens * setting.spec.hidden), 1
    for hop in axes.tensor:
        inner *= hop.fanout
        sent = round(moved * setting.compute_bytes * (hop.fanout - 1) / inner)
        for _ in range(4 if again else 2):
            yield Hop(hop.level, "reduce_scatter", "tensor", moved // inner, None, sent)
            yield Hop(hop.level, "all_gather", "tensor", moved // inner, None, sent)
    if candidate.context > 1:
        width = 2 * setting.spec.kv_heads * setting.spec.head_size / candidate.tensor
        part = round(tokens * width)
        for _ in range(back + 1 + again):
            sent = part * setting.compute_bytes * (candidate.context - 1)
            yield Hop(axes.context[-1].level, "p2p", "context", part, None, sent)


def _members(unit: Unit, setting: Setting) -> list[str]:
    """The model's own units in this one."""
    names = {"embedding": ["embedding", "positions"], "head": ["norm", "head"]}.get(unit.name, [unit.name])
    own = [each.name for each in setting.spec.units()]
    return [name for name in names if name in own] if len(unit.buffers) > 1 else [unit.name]


def _kind(layers: int, pipeline: int, stage: int) -> tuple[StageKind, int]:
    """The content of a stage, and the number of its first block."""
    first = 0
    for equal in kinds(layers, pipeline):
        if stage < equal.first + equal.many:
            return equal.kind, first + (stage - equal.first) * equal.kind.blocks
        first += equal.many * equal.kind.blocks
    raise AssertionError(f"there is no stage {stage} of {pipeline}")


def planned(setting: Setting, candidate: Candidate, axes: Axes) -> Program:
    """The program of a step, outer rounds left out. Raises PlanError for gradients of low rank."""
    framework, lp, lo = setting.framework, *hop_depths(candidate, axes.states)[::2]
    send = axes.pipeline[-1] if axes.pipeline else None
    message = round(message_bytes(setting, candidate))
    groups = candidate.groups(setting.cluster)
    where = Where(
        links_of(setting, axes.states),
        send=None if send is None else Hop(send.level, "p2p", "pipeline", message, None, message),
        halves=setting.cluster.device.kind == "cpu",
        overlap=Overlap(framework.prefetch, framework.overlap_reduce, framework.overlap_refresh),
        bucket_bytes=bucket_of(setting, candidate, axes.states),
        voters=Link(len(setting.cluster.levels) - 1, groups) if groups > 1 else None,
    )
    shape = StepShape(
        candidate.accumulate(setting), candidate.keep_gathered, candidate.pipeline, candidate.chunks, lp, lo
    )
    stages = [stage_units(setting, candidate, axes, stage) for stage in range(candidate.pipeline)]
    return program(shape, stages, where)


Sent = dict[str, dict[str, float]]


def sent_bytes(setting: Setting, candidate: Candidate, axes: Axes) -> Sent:
    """level name -> purpose -> bytes a rank of the first stage sends in one step."""
    names = setting.cluster.level_names
    found: Sent = {}
    for level, purposes in planned(setting, candidate, axes).sent_bytes(first=VOTE_EVERY).items():
        for purpose, count in purposes.items():
            _add(found, names[level], purpose, count)
    if candidate.sync is not None:
        for level, purpose, each in _rounds_bytes(setting, candidate, axes, candidate.sync):
            _add(found, names[level], purpose, each)
    return found


def _rounds_bytes(
    setting: Setting, candidate: Candidate, axes: Axes, sync: CandidateSync
) -> Iterator[tuple[int, str, float]]:
    """(level, purpose, bytes per step) of the first rank of a group, which stands for an equal part of every unit.

    Every sender, a group or a place where groups add up, sends to every other one as much, over the links of the outermost
    level at which they differ.
    """
    groups, ranks, summed = candidate.groups(setting.cluster), math.prod(hop.fanout for hop in axes.states), sync.summed
    units = [
        (name, min(buffer.used, buffer.numel // ranks))
        for chunk in stage_units(setting, replace(candidate, bucket_bytes=0), axes, 0)
        for unit in chunk
        for name, buffer in zip(_members(unit, setting), unit.buffers, strict=True)
    ]
    assigned = assign_units(units, min(sync.fragments, len(units)), "strided" if sync.said is None else sync.said.order)
    block = 128 if sync.said is None else sync.said.block
    numbers = [sum(units[place][1] for place in places) for places in assigned]
    sent = sum(exchange_bytes(n, groups=groups, codec=sync.codec, block=block, summed=summed) for n in numbers)
    senders = sync.senders(setting.cluster)
    hops = ("outer-send",) if swaps(senders, sync.codec) else ("outer-send", "outer-return")
    for level, peers in enumerate(sync.peers(setting.cluster), sync.level):
        for hop in hops if peers else ():
            yield level, hop, sent / len(hops) / sync.inner_steps * peers / (senders - 1)
    if sync.said is not None and sync.said.staleness_bound is not None:
        for level, peers in enumerate(sync.group_peers(setting.cluster), sync.level):
            yield level, "outer-beat", HEARTBEAT_BYTES * peers
    if sync.said is not None and sync.said.sum_inside is not None:
        near = setting.cluster.index(sync.said.sum_inside)
        sums, spread = (sum(each) for each in zip(*(inside_bytes(n, summed=summed) for n in numbers), strict=True))
        yield near, "outer-sum", sums / sync.inner_steps
        yield near, "outer-spread", spread / sync.inner_steps


def _add(found: Sent, level: str, purpose: str, count: float) -> None:
    of_level = found.setdefault(level, {})
    of_level[purpose] = of_level.get(purpose, 0.0) + count
