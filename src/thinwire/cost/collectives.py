"""Seconds of collectives over the hops of an axis: latency and bytes over rate, level by level.

With V bytes whole, fanouts k_1 .. k_n and K_i their products, an all-gather sends V (k_i - 1) / K_i bytes from each rank
at hop i; a reduce-scatter is its mirror; an all-reduce is both. A ring needs k - 1 messages one after another; for small
all-reduces a tree needs log2 k each way, and the faster of the two is taken (NCCL does the same).
"""

import math
from collections.abc import Sequence

from thinwire.cost.placement import Hop


def gather_hops(whole_bytes: float, hops: Sequence[Hop]) -> list[float]:
    """Seconds at each hop of an all-gather (or of its mirror, a reduce-scatter) of `whole_bytes`."""
    seconds, cumulative = [], 1
    for hop in hops:
        cumulative *= hop.fanout
        sent = whole_bytes * (hop.fanout - 1) / cumulative
        seconds.append(sent / hop.bytes_per_s + (hop.fanout - 1) * hop.latency_s + hop.start_s)
    return seconds


def gather_s(whole_bytes: float, hops: Sequence[Hop]) -> float:
    """Seconds of an all-gather or a reduce-scatter, hop after hop."""
    return sum(gather_hops(whole_bytes, hops))


def all_reduce_s(whole_bytes: float, hops: Sequence[Hop]) -> float:
    """Seconds of an all-reduce, hop after hop."""
    seconds, cumulative = 0.0, 1
    for hop in hops:
        cumulative *= hop.fanout
        part = whole_bytes * hop.fanout / cumulative
        ring = 2 * part * (hop.fanout - 1) / hop.fanout / hop.bytes_per_s + 2 * (hop.fanout - 1) * hop.latency_s
        tree = 2 * part / hop.bytes_per_s + 2 * math.ceil(math.log2(hop.fanout)) * hop.latency_s
        seconds += min(ring, tree) + hop.start_s
    return seconds


def send_s(message_bytes: float, hops: Sequence[Hop]) -> float:
    """Seconds of a message to the next stage where it is slowest: over the outermost hop of the pipeline axis."""
    if not hops:
        return 0.0
    slowest = hops[-1]
    return message_bytes / (slowest.bytes_per_s * slowest.alone) + slowest.latency_s
