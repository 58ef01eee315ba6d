"""The hops that move the states of one flat buffer, and the bytes that a rank sends at each. No torch.

With s the fanout of a level, S the product of the fanouts up to it and N elements (padding included), an all-gather or
a reduce-scatter of the level sends b N (s-1)/S bytes from each rank, b bytes an element on the wire:

    level <= lp        gathers b_w, outermost level first; one reduction b_g each micro-batch, innermost first
    lp < level <= lg   one reduction b_g each micro-batch, one gather b_w after the optimizer
    lg < level <= lo   one reduction b_g at the end of accumulation, one gather b_w after the optimizer
    level > lo         one reduction and one gather b_g at the end of accumulation
    a `lowrank` level  one reduction and one gather of each of its two messages, in fp32, at the end of accumulation

Small units travel together. A message costs a (its latency, and the work of starting it) beside its bytes; of V bytes
that arrive together nothing hides the last V (k-1)/(k b), b the rate of a member's link. For N bytes in all the sum of
both, N a / V + V (k-1)/(k b), is least at V = sqrt(N a b k/(k-1)).

A small sum over all ranks goes level by level, in the form that the level's latency and rate make cheaper: everybody
gathers everything in one round, or a reduce-scatter and an all-gather.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

from thinwire.plan.compression import wire_bytes

P_GATHER, P_REFRESH, G_REDUCE, G_GATHER = "P-gather", "P-refresh", "G-reduce", "G-gather"
SPREAD = "P-spread"
"""Masters written from outside go to their replicas; no part of a plain step."""
CONTROL = "control"

Algorithm = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "p2p"]
_DEFAULT_LATENCY_S, _DEFAULT_BYTES_PER_S = 50e-6, 1.25e8
_START_S = 4e-4
"""What a unit's message takes a rank beside its latency: Python, and the calls of the backend. Measured with gloo."""
_LARGEST_BUCKET = 2**25
"""Bytes that travel together at most: full weights and gradients of so many stay in memory until all are there."""
_TINY = 16
"""A unit so many times smaller than what travels together goes with whatever comes before it, up to that much in all."""


class Link(NamedTuple):
    """One level of the ranks that a state is sharded over, as far as what is sent depends on it."""

    level: int
    """Index among the cluster's levels."""
    fanout: int
    header_bytes: int = 0
    """What a rank sends for the tag of a gather."""
    tagged: bool = True
    """Whether ranks in different gathers find out at once."""
    latency_s: float | None = None
    bytes_per_s: float | None = None


class Hop(NamedTuple):
    """A collective of one level, as one rank takes part in it."""

    level: int
    algorithm: Algorithm
    purpose: str
    elements: int
    """Numbers of one rank's part."""
    codec: str | None
    sent_bytes: int
    """What a rank puts on the level's links."""
    payload_bytes: int = 0
    """Of the whole tensor, before any codec."""


class Buffer(NamedTuple):
    """One flat buffer of a unit: its size, how its states are sharded, and how they travel.

    Depths count the links of the axis, from -1 (a replica); `weights` and `grads` name a codec for each link, or none.
    """

    numel: int
    """Elements, padding included."""
    lp: int
    lg: int
    lo: int
    weights: tuple[str | None, ...]
    grads: tuple[str | None, ...]
    weight_bytes: int = 4
    """Of a weight that no codec compresses, on the wire."""
    grad_bytes: int = 4
    block: int = 128
    trained: bool = True
    low_rank: tuple[int, tuple[int, int]] | None = None
    """The link whose gradient sums are of low rank, and the numbers of its two messages."""
    parameters: int = 0
    """Trained parameters in it."""
    used: int = 0
    """Elements without padding."""


def gather_hops(buffer: Buffer, links: Sequence[Link]) -> Iterator[Hop]:
    """Weights from depth lp to full."""
    for place in reversed(range(buffer.lp + 1)):
        yield from _weights(buffer, links, place, P_GATHER)


def refresh_hops(buffer: Buffer, links: Sequence[Link]) -> Iterator[Hop]:
    """New weights from depth lo, where they were updated, to lp."""
    for place in reversed(range(buffer.lp + 1, buffer.lo + 1)):
        if buffer.trained:
            yield from _weights(buffer, links, place, P_REFRESH)


def reduce_hops(buffer: Buffer, links: Sequence[Link], *, last: bool) -> Iterator[Hop]:
    """A micro-batch's gradients to depth lg; after the `last` one of a step on to lo, and over the replicas of those."""
    if not buffer.trained:
        return
    outermost = len(links) - 1 if last else buffer.lg
    for place in range(outermost + 1):
        if buffer.low_rank is not None and buffer.low_rank[0] == place:
            yield from _low_rank(links[place], buffer.low_rank[1])
        else:
            yield from _gradients(buffer, links, place, "reduce_scatter", G_REDUCE)
    for place in reversed(range(buffer.lo + 1, outermost + 1)):
        if buffer.low_rank is None or buffer.low_rank[0] != place:
            yield from _gradients(buffer, links, place, "all_gather", G_GATHER)


def _weights(buffer: Buffer, links: Sequence[Link], place: int, purpose: str) -> Iterator[Hop]:
    yield from _hop(buffer, links, place, "all_gather", purpose, buffer.weights[place], buffer.weight_bytes)


def _gradients(buffer: Buffer, links: Sequence[Link], place: int, algorithm: Algorithm, purpose: str) -> Iterator[Hop]:
    yield from _hop(buffer, links, place, algorithm, purpose, buffer.grads[place], buffer.grad_bytes)


def _hop(
    buffer: Buffer,
    links: Sequence[Link],
    place: int,
    algorithm: Algorithm,
    purpose: str,
    codec: str | None,
    element_bytes: int,
) -> Iterator[Hop]:
    """A level that joins one member is as if it were not there."""
    link, shards = links[place], 1
    if link.fanout == 1:
        return
    for inner in links[: place + 1]:
        shards *= inner.fanout
    n = buffer.numel // shards
    one = element_bytes * n if codec is None else wire_bytes(codec, n, block=buffer.block, element_bytes=element_bytes)
    kept = buffer.grad_bytes if codec is not None and purpose == P_REFRESH else element_bytes  # masters are compressed
    yield Hop(link.level, algorithm, purpose, n, codec, (link.fanout - 1) * one, link.fanout * n * kept)


def _low_rank(link: Link, messages: tuple[int, int]) -> Iterator[Hop]:
    """Two small all-reduces in the place of one large one, each a reduce-scatter and an all-gather, in fp32."""
    for numbers in messages if link.fanout > 1 else ():
        n = -(-numbers // link.fanout)
        yield Hop(link.level, "reduce_scatter", G_REDUCE, n, "lowrank", 4 * (link.fanout - 1) * n)
        yield Hop(link.level, "all_gather", G_GATHER, n, "lowrank", 4 * (link.fanout - 1) * n)


def one_round_is_cheaper(
    size_bytes: int, k: int, *, latency_s: float | None = None, bytes_per_s: float | None = None
) -> bool:
    """alpha-beta cost: (k-1)(a + S/b) for gathering everything against 2(k-1)(a + S/(k b)) for a ring in two halves."""
    latency_s = _DEFAULT_LATENCY_S if latency_s is None else latency_s
    bytes_per_s = bytes_per_s or _DEFAULT_BYTES_PER_S
    return latency_s + size_bytes / bytes_per_s <= 2 * (latency_s + size_bytes / (k * bytes_per_s))


def bucket_bytes(total_bytes: int, links: Sequence[Link]) -> int:
    """Size up to which units of a model of `total_bytes` travel together: that of the outermost link's messages."""
    joined = [link for link in links if link.fanout > 1]
    if not joined:
        return 0
    link = joined[-1]
    cost_s = _START_S + (_DEFAULT_LATENCY_S if link.latency_s is None else link.latency_s)
    rate = link.bytes_per_s or _DEFAULT_BYTES_PER_S
    best = math.sqrt(total_bytes * cost_s * rate * link.fanout / (link.fanout - 1))
    return min(_LARGEST_BUCKET, round(best))


def bucketed(sizes: Sequence[int | None], most: int) -> list[int]:
    """How many of these units in turn travel together, so that none of them has more than `most` bytes.

    Tiny ones may go over it, or over what a larger unit has by itself, by a sixteenth of `most` in all. None: of a unit
    that travels alone.
    """
    counts: list[int] = []
    held, full, tiny = 0, most, most // _TINY
    for number, size in enumerate(sizes):
        before = sizes[number - 1] if number else None
        room = full + tiny if size is not None and size <= tiny else most
        if size is not None and before is not None and held + size <= room:
            counts[-1] += 1
        else:
            counts.append(1)
            held, full = 0, max(most, size or 0)
        held += size or 0
    return counts


def small_sum_hops(numbers: int, links: Sequence[Link], *, item_bytes: int = 8, halves: bool = True) -> Iterator[Hop]:
    """A sum of a few numbers over all these links. `halves`: whether it may take the form in two halves (on a CPU)."""
    for link in links:
        if link.fanout == 1:
            continue
        others, size = link.fanout - 1, numbers * item_bytes
        one_round = one_round_is_cheaper(size, link.fanout, latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)
        if one_round or not halves:
            yield Hop(link.level, "all_reduce", CONTROL, numbers, None, others * size)
            continue
        n = -(-numbers // link.fanout)
        yield Hop(link.level, "reduce_scatter", CONTROL, n, None, others * n * item_bytes)
        yield Hop(link.level, "all_gather", CONTROL, n, None, others * n * item_bytes)


def flag_hops(flags: int, links: Sequence[Link]) -> Iterator[Hop]:
    """Everybody's `flags`, a bit for each, gathered level by level."""
    for link in links:
        if link.fanout > 1:
            packed = -(-flags // 8)
            yield Hop(link.level, "all_reduce", CONTROL, packed, None, (link.fanout - 1) * packed)


def header_hops(links: Sequence[Link]) -> Iterator[Hop]:
    """The tags of a gather over these links, beside what it gathers."""
    for link in links:
        if link.fanout > 1 and link.header_bytes:
            yield Hop(link.level, "all_gather", CONTROL, 1, None, link.header_bytes)


def side_by_side(chains: Sequence[Sequence[Hop]], most: int) -> Iterator[Hop]:
    """The hops of several chains that go on in step: those of up to `most` bytes that are alike travel as one message."""
    for hops in zip_longest(*chains):
        alike: dict[object, list[Hop]] = {}
        for place, hop in enumerate(hops):
            if hop is not None:
                alike.setdefault(_form(hop) if hop.payload_bytes <= most else place, []).append(hop)
        for first, *others in alike.values():
            elements, sent, payload = (
                sum(getattr(hop, name) for hop in (first, *others))
                for name in ("elements", "sent_bytes", "payload_bytes")
            )
            yield first._replace(elements=elements, sent_bytes=sent, payload_bytes=payload)


def _form(hop: Hop) -> object:
    """What messages that travel as one have in common; sums of low rank, of which ranks have more or fewer, never do."""
    if hop.codec == "lowrank":
        return id(hop)
    summed = hop.algorithm == "reduce_scatter"
    numbers = hop.payload_bytes // hop.elements if summed and hop.codec is None else summed
    return hop.level, hop.algorithm, hop.purpose, numbers
