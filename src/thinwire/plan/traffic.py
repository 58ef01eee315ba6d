"""Bytes that a rank sends, exactly: per optimizer step by level and purpose, and across groups per exchange. No torch.

With s the fanout of a level, S the product of the fanouts up to it and N elements (padding included), an all-gather or
a reduce-scatter of the level sends b N (s-1)/S bytes from each rank, b bytes an element on the wire. Per step:

    level <= lp        gathers b_w, one reduction b_g each micro-batch
    lp < level <= lg   one reduction b_g each micro-batch, one gather b_w after the optimizer
    lg < level <= lo   one reduction b_g at the end of accumulation, one gather b_w after the optimizer
    level > lo         one reduction and one gather b_g at the end of accumulation
    a `lowrank` level  one reduction and one gather of each of its two messages, in fp32, at the end of accumulation

A unit is gathered twice a micro-batch (forward and backward); once a micro-batch if no single module spans its uses;
once a step if it is kept.

Across groups, in one exchange: n elements of this rank, M groups, c(n) bytes of n compressed elements, a header of 16 bytes
with every message (the weight of the contribution, the hash of what it was taken from). Two groups swap their compressed
changes: (M - 1)(c(n) + 16). More groups reduce in two hops, each with a chunk of ceil(n / M) elements, rounded up to whole
blocks, for every other group: 2 (M - 1)(c(chunk) + 16), as what comes back takes as many bytes as what is sent. Sparse
changes cannot be summed without growing dense, so they are always swapped.

Where k groups add up what they changed before one sum travels farther, each rank sends (k - 1)(16 + 4 ceil(n / k)) bytes
of fp32 inside for its part of the sum, and (k - 1) 4 ceil(n / k) for what comes back; across, M / k places exchange
ceil(n / k) elements as above, with 16 k bytes of headers in a message.

Groups that keep pace tell each other after every step that it is over: M - 1 bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thinwire.plan.compression import returned_as, wire_bytes

P_GATHER, P_REFRESH, G_REDUCE, G_GATHER = "P-gather", "P-refresh", "G-reduce", "G-gather"
SPREAD = "P-spread"
"""Masters written from outside go to their replicas; no part of a plain step."""

WireBytes = Callable[[int], int]
"""Elements of a message -> its bytes on the wire."""


@dataclass(frozen=True)
class Flow:
    """One flat buffer: its size, how its states are sharded, and how often it is gathered in a step."""

    numel: int
    lp: int
    lg: int
    lo: int
    gathers: int
    trained: bool
    low_rank: tuple[int, tuple[int, int]] | None = None
    """The level whose gradient sums are of low rank, and the numbers of its two messages."""


def step_bytes(
    flow: Flow,
    fanouts: Sequence[int],
    *,
    accumulate: int,
    weights: Sequence[WireBytes],
    grads: Sequence[WireBytes],
) -> dict[int, dict[str, int]]:
    """level -> purpose -> bytes. `weights` and `grads` have a function for each level."""
    out: dict[int, dict[str, int]] = {}
    cumulative = 1
    for level, fanout in enumerate(fanouts):
        cumulative *= fanout
        if fanout == 1:
            continue
        n = flow.numel // cumulative
        sent = {
            P_GATHER: flow.gathers * (fanout - 1) * weights[level](n) if level <= flow.lp else 0,
            P_REFRESH: (fanout - 1) * weights[level](n) if flow.trained and flow.lp < level <= flow.lo else 0,
            G_REDUCE: (fanout - 1) * grads[level](n) * (accumulate if level <= flow.lg else 1) if flow.trained else 0,
            G_GATHER: (fanout - 1) * grads[level](n) if flow.trained and level > flow.lo else 0,
        }
        if flow.low_rank is not None and flow.low_rank[0] == level:
            shards = sum(-(-numbers // fanout) for numbers in flow.low_rank[1])
            sent[G_REDUCE] = sent[G_GATHER] = 4 * (fanout - 1) * shards
        out[level] = {purpose: count for purpose, count in sent.items() if count}
    return out


def total(flows: Sequence[dict[int, dict[str, int]]]) -> dict[int, dict[str, int]]:
    """Sums over flat buffers."""
    out: dict[int, dict[str, int]] = {}
    for flow in flows:
        for level, purposes in flow.items():
            for purpose, count in purposes.items():
                of_level = out.setdefault(level, {})
                of_level[purpose] = of_level.get(purpose, 0) + count
    return out


HEADER_BYTES, HEARTBEAT_BYTES = 16, 1


def swaps(groups: int, codec: str) -> bool:
    """Whether every group sends its whole change to every other, instead of reducing chunks."""
    return groups <= 2 or codec == "topk"


def chunk_elements(n: int, groups: int, block: int) -> int:
    """Elements of one group's chunk in the two-hop form."""
    return -(-n // (groups * block)) * block


def exchange_bytes(n: int, *, groups: int, codec: str, block: int, element_bytes: int = 4, summed: int = 1) -> int:
    """Bytes that this rank sends compressed for `n` elements of a fragment; `summed` of the groups add theirs up before."""
    places, mine, head_bytes = groups // summed, inside_elements(n, summed), HEADER_BYTES * summed
    if places == 1 or n == 0:
        return 0
    if swaps(places, codec):
        return (places - 1) * (wire_bytes(codec, mine, block=block, element_bytes=element_bytes) + head_bytes)
    chunk = chunk_elements(mine, places, block)
    hops = (codec, returned_as(codec))
    compressed = [wire_bytes(name, chunk, block=block, element_bytes=element_bytes) for name in hops]
    return (places - 1) * sum(compressed_bytes + head_bytes for compressed_bytes in compressed)


def inside_elements(n: int, summed: int) -> int:
    """Elements of which each of the k = `summed` ranks that add up `n` has the sum."""
    return -(-n // summed)


def inside_bytes(n: int, *, summed: int, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes that this rank sends to those it adds up with: (of changes and headers, of what comes back)."""
    chunk_bytes = element_bytes * inside_elements(n, summed)
    return ((summed - 1) * (chunk_bytes + HEADER_BYTES), (summed - 1) * chunk_bytes) if n else (0, 0)
