"""The step program of a candidate: the units of its stages as the engine would find them, and what a rank sends.

Units are the model's own (embedding, positions, blocks, norm, head), padded as the engine pads them. A level that the data
axis does not cross does not count: depths are translated to hops of that axis. Of a pipeline's stages, and under other
runtimes, units are a block, the embedding with positions, and the head with the final norm.
"""

import math
from collections.abc import Iterator

from thinwire.plan.hops import Hop, Link
from thinwire.plan.operations import Program, Unit
from thinwire.plan.program import VOTE_EVERY, Overlap, StepShape, Where, program
from thinwire.plan.rounds import HEARTBEAT_BYTES, assign_units, exchange_bytes, inside_bytes, swaps
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.pipeline import StageKind, kinds, message_bytes, parameters_of
from thinwire.predict.placement import Axes, buffer_of, hop_depths, links_of


def stage_units(setting: Setting, candidate: Candidate, axes: Axes, stage: int) -> list[list[Unit]]:
    """The units of each chunk of a stage, in forward order; the first chunk has the embedding, the last one the head."""
    spec, chunks = setting.spec, candidate.chunks
    resident = spec.tied and candidate.pipeline == 1 and setting.framework.tied_units
    named = list(_named(setting, candidate, stage))
    inside = (
        tuple(activation_hops(setting, candidate, axes)),
        tuple(activation_hops(setting, candidate, axes, back=True)),
    )
    units = [
        Unit(
            name,
            (buffer_of(n, setting, candidate, axes.states, parameters=many),),
            name == "embedding" and resident,
            *(inside if name.startswith("blocks.") else ()),
        )
        for name, n, many in named
    ]
    blocks = [unit for unit in units if unit.name.startswith("blocks.")]
    before = units[: units.index(blocks[0])]
    after = units[len(before) + len(blocks) :]
    found, start = [], 0
    for chunk in range(chunks):
        end = start + len(blocks) // chunks + (chunk < len(blocks) % chunks)
        found.append(blocks[start:end])
        start = end
    found[0] = [*before, *found[0]]
    found[-1] = [*found[-1], *after]
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


def _named(setting: Setting, candidate: Candidate, stage: int) -> Iterator[tuple[str, float, int]]:
    """(name, elements, how many parameters) of each unit of a stage."""
    spec = setting.spec
    if candidate.pipeline == 1:
        shapes = spec.parameter_shapes()
        for unit in spec.units():
            elements = sum(math.prod(shapes[name]) for name in unit.parameters) / candidate.tensor
            yield unit.name, elements, len(unit.parameters)
        return
    kind, first = _kind(spec.layers, candidate.pipeline, stage)
    held = parameters_of(setting, kind, candidate.tensor)
    many = {unit.name: len(unit.parameters) for unit in spec.units()}
    if "embedding" in held:
        yield "embedding", held["embedding"], many["embedding"] + many.get("positions", 0)
    yield from ((f"blocks.{first + number}", held["block"], many["blocks.0"]) for number in range(kind.blocks))
    if "head" in held:
        yield "head", held["head"], many["norm"] + many.get("head", 0)


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
        (unit.name, min(unit.buffers[0].used, unit.buffers[0].numel // ranks))
        for chunk in stage_units(setting, candidate, axes, 0)
        for unit in chunk
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
