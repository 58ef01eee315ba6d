"""What a rank sends in a step: bytes by level and purpose, as the ledger of a real run counts them, and seconds by hop.

Units are the model's own (embedding, positions, blocks, norm, head), padded as the engine pads them. A level that the data
axis does not cross does not count: depths are translated to hops of that axis. Numbers that travel under a codec also cost
device memory traffic for compressing and decompressing.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

from thinwire.errors import PlanError
from thinwire.plan.compression import wire_bytes
from thinwire.plan.rounds import assign_units
from thinwire.plan.traffic import (
    G_GATHER,
    G_REDUCE,
    HEARTBEAT_BYTES,
    P_GATHER,
    P_REFRESH,
    Flow,
    WireBytes,
    exchange_bytes,
    inside_bytes,
    step_bytes,
    swaps,
    total,
)
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.overlap import Chain, UnitMoves
from thinwire.predict.pipeline import kinds, message_bytes, parameters_of
from thinwire.predict.placement import Axes, Hop, hop_depths, touch_s

CODING_BYTES = 6.0
"""Device memory read and written to compress or decompress one number."""


def padded(elements: float, candidate: Candidate, hops: Sequence[Hop]) -> int:
    """Elements of a flat buffer: rounded up as the engine does it."""
    ranks = 1
    for hop in hops:
        ranks *= hop.fanout
    multiple = ranks * (candidate.coding.block if _compressed(candidate) else 1)
    return -(-round(elements) // multiple) * multiple


def unit_bytes(
    elements: float,
    setting: Setting,
    candidate: Candidate,
    hops: Sequence[Hop],
    *,
    accumulate: int,
    resident: bool = False,
) -> dict[int, dict[str, int]]:
    """level -> purpose -> bytes one rank sends in a step for a unit of so many elements.

    A `resident` unit stays unsharded from forward to backward because no single module spans its uses.
    """
    lp, lg, lo = hop_depths(candidate, hops)
    gathers = 0 if lp < 0 else 1 if candidate.keep_gathered else (1 if resident else 2) * accumulate
    flow = Flow(padded(elements, candidate, hops), lp, lg, lo, gathers, True)
    weights, grads = _formats(setting, candidate, hops)
    found = step_bytes(flow, [hop.fanout for hop in hops], accumulate=accumulate, weights=weights, grads=grads)
    return {hops[index].level: purposes for index, purposes in found.items() if purposes}


class _Chain:
    """Hops of one chain as they are added up: seconds behind compute by level, and a rank's own."""

    def __init__(self) -> None:
        self.behind: Chain = ()
        self.own_s = 0.0
        self.sync_point_s = 0.0
        """Of the point at which compute stops for the chain, however many hops it has."""

    def plus(self, other: "_Chain") -> "_Chain":
        both = _Chain()
        both.behind, both.own_s = self.behind + other.behind, self.own_s + other.own_s
        both.sync_point_s = max(self.sync_point_s, other.sync_point_s)
        return both


def unit_moves(
    elements: float, setting: Setting, candidate: Candidate, hops: Sequence[Hop], *, resident: bool = False
) -> UnitMoves:
    """Seconds of each chain of a unit of so many elements."""
    if not hops or elements == 0:
        return UnitMoves()
    lp, lg, lo = hop_depths(candidate, hops)
    flow = Flow(padded(elements, candidate, hops), lp, lg, lo, 1, True)
    weights, grads = _formats(setting, candidate, hops)
    once = step_bytes(flow, [hop.fanout for hop in hops], accumulate=1, weights=weights, grads=grads)
    held = [flow.numel]
    for hop in hops:
        held.append(held[-1] // hop.fanout)
    # One broadcast for each owner instead of one gather: their starts, spread over the units.
    owners = held[lp + 1] / held[lo + 1] / (setting.spec.layers + 2)

    def chain(indices: Sequence[int], purpose: str, codecs: Sequence[str | None]) -> _Chain:
        found = _Chain()
        for index in indices:
            hop, sent = hops[index], once.get(index, {}).get(purpose, 0)
            if not sent:
                continue
            broadcast = setting.framework.broadcast_refresh and purpose == P_REFRESH and index == lo
            starts = owners if broadcast else 1.0
            moving = sent / hop.bytes_per_s + (hop.fanout - 1) * hop.latency_s + starts * hop.start_s
            compressing, own = _compression_s(setting, _codec(codecs, hop), held[index], hop, purpose)
            adding = setting.calibration.sum_s * held[index] if purpose == G_REDUCE else 0.0
            found.own_s += (1 - hop.behind) * moving + own + adding
            if hop.behind == 0:
                found.sync_point_s = setting.calibration.meeting_s
            if hop.behind > 0:
                found.behind += ((hop.level, hop.behind * moving + compressing),)
        return found

    every = range(len(hops))
    inward = every[::-1]
    gather = chain(inward, P_GATHER, candidate.weights)
    each = chain([i for i in every if i <= lg], G_REDUCE, candidate.grads)
    outside = chain([i for i in every if i > lg], G_REDUCE, candidate.grads).plus(
        chain(inward, G_GATHER, candidate.grads)
    )
    refresh = chain(inward, P_REFRESH, candidate.weights)
    collect = 0.0 if _read_in_place(setting, candidate, hops[0], lg) else setting.calibration.collect_s * flow.numel
    kept = candidate.keep_gathered
    forward = _Chain() if kept else gather
    backward = each if kept or resident else each.plus(gather)
    # Where a chain that comes once a step waits at another one's synchronisation point anyway, they wait once.
    first = max(refresh.sync_point_s, gather.sync_point_s) - forward.sync_point_s
    last = max(0.0, outside.sync_point_s - backward.sync_point_s)
    return UnitMoves(
        gather=gather.behind,
        again=() if resident else gather.behind,
        reduce_each=each.behind,
        reduce_last=each.behind + outside.behind,
        refresh=refresh.behind,
        own_forward_s=forward.own_s + forward.sync_point_s,
        own_backward_s=backward.own_s + backward.sync_point_s + collect,
        own_once_s=outside.own_s + refresh.own_s + (gather.own_s if kept else 0.0) + first + last,
    )


def _read_in_place(setting: Setting, candidate: Candidate, first: Hop, lg: int) -> bool:
    """Whether gradients go out from where backward has left them (`accumulation.py`), so that none are taken over."""
    uncoded = first.behind == 0 and not _codec(candidate.grads, first)
    return uncoded and (lg >= 0 or candidate.accumulate(setting) == 1)


def _compression_s(setting: Setting, codec: str | None, full: int, hop: Hop, purpose: str) -> tuple[float, float]:
    """(seconds beside the hop, seconds of the rank's own) for compressing what it sends and decompressing what all send.

    A reduce-scatter codes all of its `full` numbers, a gather its own share of them. Not measured: as long as touching
    their bytes takes, between the hops.
    """
    if not codec:
        return 0.0, 0.0
    known = setting.calibration.coding_s.get(codec.removeprefix("delta-"))
    if known is None:
        return touch_s(CODING_BYTES * 2 * full, setting), 0.0
    compressed = full if purpose == G_REDUCE else full / hop.fanout
    return 0.0, known[0] * compressed + known[1] * full


def _codec(codecs: Sequence[str | None], hop: Hop) -> str | None:
    found = codecs[hop.level] if hop.level < len(codecs) else None
    if found == "lowrank":
        raise PlanError(
            "gradients of low rank are not planned: what they send and cost depends on every matrix's shape"
        )
    return found


def _compressed(candidate: Candidate) -> bool:
    return any(codec not in (None, "fp32", "bf16", "fp16") for codec in (*candidate.weights, *candidate.grads))


def _formats(setting: Setting, candidate: Candidate, hops: Sequence[Hop]) -> tuple[list[WireBytes], list[WireBytes]]:
    plain_weight, plain_grad = setting.compute_bytes, round(setting.framework.grad_wire_bytes)
    wire = partial(_wire, candidate.coding.block)
    weights: list[WireBytes] = [partial(wire, _codec(candidate.weights, hop), plain_weight) for hop in hops]
    grads: list[WireBytes] = [partial(wire, _codec(candidate.grads, hop), plain_grad) for hop in hops]
    return weights, grads


def _wire(block: int, codec: str | None, element_bytes: int, n: int) -> int:
    return element_bytes * n if codec is None else wire_bytes(codec, n, block=block, element_bytes=element_bytes)


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


def _rounds_bytes(
    setting: Setting, candidate: Candidate, axes: Axes, sync: CandidateSync
) -> Iterator[tuple[int, str, float]]:
    """(level, purpose, bytes per step) of the first rank of a group, which stands for an equal part of every unit.

    Every sender, a group or a place where groups add up, sends to every other one as much, over the links of the outermost
    level at which they differ.
    """
    groups, ranks, summed = candidate.groups(setting.cluster), math.prod(hop.fanout for hop in axes.states), sync.summed
    units = [
        (name, min(round(elements), padded(elements, candidate, axes.states) // ranks))
        for name, elements in _named_units(setting, candidate)
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
    """(elements, whether it stays unsharded from forward to backward) of each unit."""
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


def _reduced(hops: tuple[Hop, ...], purpose: str, full: float) -> Iterator[tuple[int, str, float]]:
    """An all-reduce of `full` bytes over hops: a reduce-scatter and its mirror."""
    cumulative = 1
    for hop in hops:
        cumulative *= hop.fanout
        yield hop.level, purpose, 2 * full * (hop.fanout - 1) / cumulative


def _add(found: Sent, level: str, purpose: str, count: float) -> None:
    of_level = found.setdefault(level, {})
    of_level[purpose] = of_level.get(purpose, 0.0) + count
