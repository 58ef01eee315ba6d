"""Seconds of what moves a unit's states, hop by hop. Numbers that travel under a codec also cost device memory traffic for
compressing and decompressing."""

import math
from collections.abc import Iterable, Sequence

from thinwire.plan.hops import G_REDUCE, P_REFRESH, gather_hops, reduce_hops, refresh_hops
from thinwire.plan.hops import Hop as Sending
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.overlap import Chain, UnitMoves
from thinwire.predict.placement import Hop, buffer_of, links_of, touch_s

CODING_BYTES = 6.0
"""Device memory read and written to compress or decompress one number."""


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
    """Seconds of each chain of a unit of so many elements, or of units that travel together."""
    if not hops or elements == 0:
        return UnitMoves()
    buffer, links = buffer_of(elements, setting, candidate, hops), links_of(setting, hops)
    placed = {hop.level: hop for hop in hops}
    # One broadcast for each owner instead of one gather: their starts, spread over the units.
    inside, spread = hops[: buffer.lo + 1], setting.framework.broadcast_refresh
    owners = math.prod(hop.fanout for hop in inside[buffer.lp + 1 :]) / (setting.spec.layers + 2)

    def chain(sends: Iterable[Sending]) -> _Chain:
        found = _Chain()
        for sent in sends:
            hop, full = placed[sent.level], sent.elements * placed[sent.level].fanout
            last = bool(inside) and hop is inside[-1]
            starts = owners if spread and sent.purpose == P_REFRESH and last else 1.0
            moving = sent.sent_bytes / hop.bytes_per_s + (hop.fanout - 1) * hop.latency_s + starts * hop.start_s
            compressing, own = _compression_s(setting, sent.codec, full, hop, sent.purpose)
            adding = setting.calibration.sum_s * full if sent.purpose == G_REDUCE else 0.0
            found.own_s += (1 - hop.behind) * moving + own + adding
            if hop.behind == 0:
                found.sync_point_s = setting.calibration.meeting_s
            if hop.behind > 0:
                found.behind += ((hop.level, hop.behind * moving + compressing),)
        return found

    gather = chain(gather_hops(buffer, links))
    inwards, all_the_way = (list(reduce_hops(buffer, links, last=last)) for last in (False, True))
    each, outside = chain(inwards), chain(all_the_way[len(inwards) :])
    refresh = chain(refresh_hops(buffer, links))
    in_place = _read_in_place(setting, candidate, hops[0], buffer.lg)
    collect = 0.0 if in_place else setting.calibration.collect_s * buffer.numel
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
    uncoded = first.behind == 0 and not (candidate.grads and candidate.grads[first.level])
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
