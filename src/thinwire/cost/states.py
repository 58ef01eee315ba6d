"""What the partition moves for one unit: bytes by level and purpose (the engine's own formula) and seconds by hop.

A level that the data axis does not cross does not count: depths are translated to hops of that axis. Numbers that
travel under a codec also cost device memory traffic for coding and decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from thinwire.cost.candidate import Candidate, Setting
from thinwire.cost.device import touch_s
from thinwire.cost.placement import Hop
from thinwire.traffic import G_GATHER, G_REDUCE, P_GATHER, P_REFRESH, Flow, WireBytes, step_bytes
from thinwire.wire import wire_bytes

BLOCK = 128
"""Numbers that share a scale; the default of a plan's wire."""
CODING_BYTES = 6.0
"""Device memory read and written to code or decode one number."""
Chain = tuple[tuple[int, float], ...]
"""(level, seconds) of hops that follow one another."""


@dataclass(frozen=True)
class UnitMoves:
    """Seconds of everything that moves one unit's states, hop by hop."""

    gather: Chain = ()
    """Weights become whole: each micro-batch, outermost hop first."""
    reduce_each: Chain = ()
    """Gradients of a micro-batch reach their level."""
    reduce_last: Chain = ()
    """Those of the last micro-batch reach theirs, and are then summed over everything outside it."""
    refresh: Chain = ()
    """New weights go from where they were updated to where they are kept."""


def hop_depths(candidate: Candidate, hops: Sequence[Hop]) -> tuple[int, int, int]:
    """(lp, lg, lo) counted in hops of the data axis."""
    lp, lg, lo = (sum(1 for hop in hops if hop.level <= depth) - 1 for depth in candidate.depths)
    return lp, lg, lo


def padded(elements: float, candidate: Candidate, hops: Sequence[Hop]) -> int:
    """Elements of a flat buffer: rounded up as the engine does it."""
    ranks = 1
    for hop in hops:
        ranks *= hop.fanout
    multiple = ranks * (BLOCK if _coded(candidate) else 1)
    return -(-round(elements) // multiple) * multiple


def unit_bytes(
    elements: float, setting: Setting, candidate: Candidate, hops: Sequence[Hop], *, accumulate: int
) -> dict[int, dict[str, int]]:
    """level -> purpose -> bytes one rank sends in a step for a unit of so many elements."""
    lp, lg, lo = hop_depths(candidate, hops)
    gathers = 0 if lp < 0 else 1 if candidate.keep_gathered else 2 * accumulate
    flow = Flow(padded(elements, candidate, hops), lp, lg, lo, gathers, True)
    weights, grads = _formats(setting, candidate, hops)
    found = step_bytes(flow, [hop.fanout for hop in hops], accumulate=accumulate, weights=weights, grads=grads)
    return {hops[index].level: purposes for index, purposes in found.items() if purposes}


def unit_moves(elements: float, setting: Setting, candidate: Candidate, hops: Sequence[Hop]) -> UnitMoves:
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

    def seconds(index: int, purpose: str, codecs: Sequence[str | None]) -> float:
        hop, sent = hops[index], once.get(index, {}).get(purpose, 0)
        coding = touch_s(CODING_BYTES * 2 * held[index], setting) if sent and _codec(codecs, hop) else 0.0
        if not sent:
            return 0.0
        broadcast = setting.framework.broadcast_refresh and purpose == P_REFRESH and index == lo
        starts = owners if broadcast else 1.0
        return sent / hop.bytes_per_s + (hop.fanout - 1) * hop.latency_s + starts * hop.start_s + coding

    def chain(indices: Sequence[int], purpose: str, codecs: Sequence[str | None]) -> Chain:
        return tuple((hops[i].level, s) for i in indices if (s := seconds(i, purpose, codecs)) > 0)

    every = range(len(hops))
    inward = every[::-1]
    reduce_each = chain([i for i in every if i <= lg], G_REDUCE, candidate.grads)
    outside = chain([i for i in every if i > lg], G_REDUCE, candidate.grads) + chain(inward, G_GATHER, candidate.grads)
    return UnitMoves(
        gather=chain(inward, P_GATHER, candidate.weights),
        reduce_each=reduce_each,
        reduce_last=reduce_each + outside,
        refresh=chain(inward, P_REFRESH, candidate.weights),
    )


def _codec(codecs: Sequence[str | None], hop: Hop) -> str | None:
    return codecs[hop.level] if hop.level < len(codecs) else None


def _coded(candidate: Candidate) -> bool:
    return any(codec not in (None, "fp32", "bf16", "fp16") for codec in (*candidate.weights, *candidate.grads))


def _formats(setting: Setting, candidate: Candidate, hops: Sequence[Hop]) -> tuple[list[WireBytes], list[WireBytes]]:
    plain_weight, plain_grad = setting.compute_bytes, round(setting.framework.grad_wire_bytes)
    weights: list[WireBytes] = [partial(_wire, _codec(candidate.weights, hop), plain_weight) for hop in hops]
    grads: list[WireBytes] = [partial(_wire, _codec(candidate.grads, hop), plain_grad) for hop in hops]
    return weights, grads


def _wire(codec: str | None, element_bytes: int, n: int) -> int:
    return element_bytes * n if codec is None else wire_bytes(codec, n, block=BLOCK, element_bytes=element_bytes)
