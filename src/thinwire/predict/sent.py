"""Bytes that one rank sends in a step, by level and purpose. Those of the data axis equal the ledger of a real run.

Units are the model's own (embedding, positions, blocks, norm, head), padded as the engine pads them.
"""

import math
from collections.abc import Iterator

from thinwire.plan.rounds import deal
from thinwire.plan.traffic import BEAT_BYTES, exchange_bytes, inside_bytes, swaps, total
from thinwire.predict.candidate import Candidate, Setting, Sync
from thinwire.predict.pipeline import kinds, parameters_of
from thinwire.predict.placement import Axes, Hop
from thinwire.predict.states import padded, unit_bytes
from thinwire.predict.step import message_bytes

Sent = dict[str, dict[str, float]]


def sent_bytes(setting: Setting, candidate: Candidate, axes: Axes) -> Sent:
    """level name -> purpose -> bytes a rank of the first stage sends in one step."""
    names = setting.cluster.level_names
    found: Sent = {}
    for level, purposes in data_bytes(setting, candidate, axes).items():
        for purpose, count in purposes.items():
            _add(found, names[level], purpose, count)
    for level, purpose, each in _axes_bytes(setting, candidate, axes):
        _add(found, names[level], purpose, each * candidate.accumulate(setting))
    if candidate.sync is not None:
        for level, purpose, each in _rounds_bytes(setting, candidate, axes, candidate.sync):
            _add(found, names[level], purpose, each)
    return found


def _rounds_bytes(setting: Setting, candidate: Candidate, axes: Axes, sync: Sync) -> Iterator[tuple[int, str, float]]:
    """(level, purpose, bytes per step) of the first rank of a group, which stands for an equal part of every unit.

    Every sender, a group or a place where groups add up, sends to every other one as much, over the links of the outermost
    level at which they differ.
    """
    groups, ranks, summed = candidate.groups(setting.cluster), math.prod(hop.fanout for hop in axes.states), sync.summed
    units = [
        (name, min(round(elements), padded(elements, candidate, axes.states) // ranks))
        for name, elements in _named_units(setting, candidate)
    ]
    dealt = deal(units, min(sync.fragments, len(units)), "strided" if sync.said is None else sync.said.order)
    block = 128 if sync.said is None else sync.said.block
    numbers = [sum(units[place][1] for place in places) for places in dealt]
    sent = sum(exchange_bytes(n, groups=groups, codec=sync.codec, block=block, summed=summed) for n in numbers)
    senders = sync.senders(setting.cluster)
    hops = ("outer-send",) if swaps(senders, sync.codec) else ("outer-send", "outer-return")
    for level, peers in enumerate(sync.peers(setting.cluster), sync.level):
        for hop in hops if peers else ():
            yield level, hop, sent / len(hops) / sync.inner_steps * peers / (senders - 1)
    if sync.said is not None and sync.said.lead is not None:
        for level, peers in enumerate(sync.group_peers(setting.cluster), sync.level):
            yield level, "outer-beat", BEAT_BYTES * peers
    if sync.said is not None and sync.said.sum_inside is not None:
        near = setting.cluster.index(sync.said.sum_inside)
        sums, spread = (sum(each) for each in zip(*(inside_bytes(n, summed=summed) for n in numbers), strict=True))
        yield near, "outer-sum", sums / sync.inner_steps
        yield near, "outer-spread", spread / sync.inner_steps


def data_bytes(setting: Setting, candidate: Candidate, axes: Axes) -> dict[int, dict[str, int]]:
    """level index -> purpose -> bytes of the data axis, for a rank of the first stage."""
    accumulate = candidate.accumulate(setting)
    return total(
        [
            unit_bytes(n, setting, candidate, axes.states, accumulate=accumulate, resident=resident)
            for n, resident in _units(setting, candidate)
        ]
    )


def _units(setting: Setting, candidate: Candidate) -> Iterator[tuple[float, bool]]:
    """(elements, whether it stays whole from forward to backward) of each unit."""
    tied = setting.spec.tied and candidate.pipeline == 1
    for name, elements in _named_units(setting, candidate):
        yield elements, tied and name == "embedding"


def _named_units(setting: Setting, candidate: Candidate) -> Iterator[tuple[str, float]]:
    """(name, elements) of each unit of the first stage."""
    spec = setting.spec
    if candidate.pipeline == 1:
        shapes = spec.parameter_shapes()
        for unit in spec.units():
            yield unit.name, sum(math.prod(shapes[name]) for name in unit.parameters) / candidate.tensor
        return
    first = kinds(spec.layers, candidate.pipeline)[0].kind
    held = parameters_of(setting, first, candidate.tensor)
    yield from ((f"blocks.{number}", held["block"]) for number in range(first.blocks))
    yield "embedding", held["embedding"]


def _axes_bytes(setting: Setting, candidate: Candidate, axes: Axes) -> Iterator[tuple[int, str, float]]:
    """(level, purpose, bytes per micro-batch) of the axes that the trainer does not run yet."""
    blocks = kinds(setting.spec.layers, candidate.pipeline)[0].kind.blocks
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    moved = tokens * setting.spec.hidden * setting.compute_bytes
    passes = 6 if candidate.recompute == "full" else 4
    yield from _reduced(axes.tensor, "tensor", moved * passes * blocks)
    if candidate.pipeline > 1:
        hop = axes.pipeline[-1]
        yield hop.level, "pipeline", message_bytes(setting, candidate) * candidate.chunks
    if candidate.context > 1:
        width = 2 * setting.spec.kv_heads * setting.spec.head_size / candidate.tensor * setting.compute_bytes
        rounds = (4 if candidate.recompute == "full" else 3) * blocks * (candidate.context - 1)
        yield axes.context[-1].level, "context", tokens * width * rounds


def _reduced(hops: tuple[Hop, ...], purpose: str, whole: float) -> Iterator[tuple[int, str, float]]:
    """An all-reduce of `whole` bytes over hops: a reduce-scatter and its mirror."""
    cumulative = 1
    for hop in hops:
        cumulative *= hop.fanout
        yield hop.level, purpose, 2 * whole * (hop.fanout - 1) / cumulative


def _add(found: Sent, level: str, purpose: str, count: float) -> None:
    of_level = found.setdefault(level, {})
    of_level[purpose] = of_level.get(purpose, 0.0) + count
