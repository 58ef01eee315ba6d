"""One exchange of a peer group: every member's change goes in, the same aggregate comes out for all of them, bit for bit.

Two forms with the bytes of `thinwire.plan.rounds`. Few groups swap their coded changes whole. More groups send each
other chunks (all-to-all), aggregate their own chunk in the order of the groups, and send the coded result back to all;
everybody, the owner too, uses what was decoded. Numbers are coded twice, never from hop to hop along a ring, and
`compression.returned_as` says how the second time. The aggregation function sees all contributions of a chunk at once,
at no extra traffic.

An exchange in two tiers: contributions are added up, as they are, over fast links before one sum travels on slow ones.

k groups that a fast level joins, in each of h places. Every rank adds up one chunk of the changes of its k, exchanges that
with those who hold the same chunk elsewhere, coded, and gives what comes out to its k again. A place sends as many bytes as
one group would, instead of k times as many; and the contributions of a place are coded once, after they have been averaged.

The groups of a place have added up their changes before anyone can tell that one of them has diverged: then the sum of that
place is left out of this exchange, all of it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import Codec, Raw
from thinwire.comm.collectives import all_gather, reduce_scatter
from thinwire.comm.handle import Handle
from thinwire.comm.transport.connect import transport_of
from thinwire.comm.transport.transport import Waitable
from thinwire.comm.world import World
from thinwire.plan.rounds import HEADER_BYTES, HEARTBEAT_BYTES, chunk_elements, inside_elements, swaps
from thinwire.plan.sync import Aggregate
from thinwire.sync.message import Outcome, aggregate, aggregate_coded, header
from thinwire.sync.peers import HEARTBEAT, RETURN, SEND, PeerGroup


def exchange(
    change: Tensor,
    outcome: Outcome,
    *,
    headers: Tensor,
    peers: PeerGroup,
    codec: Codec,
    back: Codec,
    seed: int,
    block: int,
    how: Aggregate,
    world: World,
) -> Iterator[Handle]:
    """Yields the handle of each hop; fills `outcome` on the way. `headers`: `header` of each group this rank speaks for."""
    hop = _Hop(world, peers, codec)
    n, members = change.numel(), peers.size
    if members == 1:
        decoded = codec.decode(codec.encode(change, seed=seed), n, change.dtype)
        outcome.change.copy_(aggregate([decoded], outcome.count(headers, peers.members), how))
        if outcome.own is not None:
            outcome.own.copy_(decoded)
    elif swaps(members, codec.name):
        coded = codec.encode(change, seed=seed)
        if outcome.own is not None:
            outcome.own.copy_(codec.decode(coded, n, change.dtype))
        yield from hop.gather(torch.cat([headers, coded]), SEND, change.nbytes)
        hop.combine(outcome.change, hop.count(outcome), how)
    else:
        chunk = chunk_elements(n, members, block)
        chunks = torch.nn.functional.pad(change, (0, members * chunk - n)).view(members, chunk)
        coded_chunks = [codec.encode(part, seed=seed) for part in chunks]
        if outcome.own is not None:
            _join(outcome.own, (codec.decode(part, chunk, change.dtype) for part in coded_chunks))
        yield from hop.scatter(torch.stack([torch.cat([headers, part]) for part in coded_chunks]), change.nbytes)
        mine = change.new_empty(chunk)
        hop.combine(mine, hop.count(outcome), how)
        hop = _Hop(world, peers, back)
        yield from hop.gather(torch.cat([headers, back.encode(mine, seed=seed)]), RETURN, change.nbytes)
        hop.count(outcome)
        _join(outcome.change, hop.read(chunk, change.dtype))


def check(headers: Tensor, outcome: Outcome, *, peers: PeerGroup, world: World) -> Iterator[Handle]:
    """Tell the others a hash of the outer state, and nothing else; `outcome` says who has diverged."""
    hop = _Hop(world, peers, Raw(torch.float32))
    if peers.size > 1:
        yield from hop.gather(headers, SEND, HEADER_BYTES, said="control")
        hop.count(outcome)


def heartbeat(*, peers: PeerGroup, world: World) -> Iterator[Handle]:
    """Tell the others that a step is over, and hear it of them."""
    if peers.size > 1:
        message = torch.zeros(HEARTBEAT_BYTES, dtype=torch.uint8)  # on the CPU: no accelerator has to wait for it
        yield from _Hop(world, peers, Raw(torch.uint8)).gather(message, HEARTBEAT, HEARTBEAT_BYTES)


class _Hop:
    """Messages to and from all members."""

    def __init__(self, world: World, peers: PeerGroup, codec: Codec) -> None:
        self._world, self._peer_group, self._codec = world, peers, codec
        self._received = torch.empty(0)

    def gather(self, message: Tensor, hop: str, payload_bytes: int, *, said: str | None = None) -> Iterator[Handle]:
        """Send `message` to all members; the ledger calls it `said`, else by the name of the hop."""
        peers = self._peer_group
        self._received = torch.empty(peers.size, message.numel(), dtype=torch.uint8, device=message.device)
        with self._world.outstanding.issuing():
            works = transport_of(peers.communicators[hop]).all_gather(self._received, message, among=peers.present)
        yield self._handle("all_gather", said or hop, payload_bytes, message.numel(), works, message)

    def scatter(self, messages: Tensor, payload_bytes: int) -> Iterator[Handle]:
        """Send message m to member m."""
        peers = self._peer_group
        self._received = torch.empty_like(messages)
        with self._world.outstanding.issuing():
            works = transport_of(peers.communicators[SEND]).all_to_all(self._received, messages, among=peers.present)
        yield self._handle("all_to_all", SEND, payload_bytes, messages.shape[1], works, messages)

    def count(self, outcome: Outcome) -> list[float]:
        """Whose messages, of those that came last, count: into `outcome`; the weight of each."""
        return outcome.count(self._received[:, : self._peer_group.header_bytes], self._peer_group.members)

    def read(self, n: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Of each member the decoded numbers (n,) of what came last, one at a time."""
        return (self._codec.decode(coded, n, dtype) for coded in self._coded)

    def combine(self, out_n: Tensor, weights: Sequence[float], how: Aggregate) -> None:
        """`out_n` becomes the aggregate of what came last."""
        aggregate_coded(self._coded, out_n, weights, how, self._codec)

    @property
    def _coded(self) -> Tensor:
        """What came last, a row from each member, without the headers."""
        return self._received[:, self._peer_group.header_bytes :]

    def _handle(
        self, kind: str, purpose: str, payload_bytes: int, message_bytes: int, works: Sequence[Waitable], sent: Tensor
    ) -> Handle:
        group = self._peer_group
        peers = Counter(group.levels[place] for place in group.present if place != group.place)
        *nearer, farthest = [
            self._world.ledger.open(
                level=level,
                kind=kind,
                purpose=purpose,
                payload_bytes=payload_bytes,
                sent_bytes=message_bytes * peers[level],
                codec=self._codec.name,
            )
            for level in dict.fromkeys((*self._world.cluster.level_names, *peers))
            if level in peers
        ]
        return Handle(self._world.outstanding, farthest, works, keep=(sent, self._received), beside=nearer)


def _join(target_n: Tensor, chunks: Iterable[Tensor]) -> None:
    """Fill `target_n` with the chunks, back to back; the last ones may reach beyond it."""
    at = 0
    for chunk in chunks:
        place = target_n[at : at + len(chunk)]
        place.copy_(chunk[: len(place)])
        at += len(chunk)


SUM, SPREAD = "outer-sum", "outer-spread"


def exchange_sums(
    change: Tensor, outcome: Outcome, *, weight: float, digest: int, peers: PeerGroup, how: Aggregate, **across: Any
) -> Iterator[Handle]:
    """As `exchange`, for means, among the ranks of a peer group with an inside; `across`: what else that one takes."""
    near, n = peers.inside, change.numel()
    assert near is not None
    assert peers.across is not None
    k, chunk = near.size, inside_elements(n, near.size)
    weight = float(weight > 0) if how == "mean" else weight
    whole = _weighted(change, weight, k * chunk)
    headers, mine = torch.empty(k, HEADER_BYTES, dtype=torch.uint8, device=change.device), change.new_empty(chunk)
    told = all_gather(headers, header(weight, digest, change.device), world=near, level=0, purpose=SUM)
    summed = reduce_scatter(mine, whole, world=near, level=0, purpose=SUM)
    yield Handle(near.outstanding, None, [told, summed])
    total = headers.cpu().view(torch.float64)[:, 0].sum().item()
    mine.div_(total or 1.0)
    inner = Outcome(torch.empty_like(mine), None)
    yield from exchange(mine, inner, headers=headers.view(-1), peers=peers.across, how="tokens", **across)
    outcome.weights, outcome.diverged = inner.weights, inner.diverged
    target = outcome.change if k * chunk == n else change.new_empty(k * chunk)
    yield all_gather(target, inner.change, world=near, level=0, purpose=SPREAD)
    if target is not outcome.change:
        outcome.change.copy_(target[:n])


def _weighted(change_n: Tensor, weight: float, size: int) -> Tensor:
    """`weight` times the change, zeros up to `size`; of a contribution that is left out nothing, not even a NaN."""
    if weight == 0:
        return change_n.new_zeros(size)
    weighted = change_n if weight == 1 else change_n * weight
    return weighted if size == len(weighted) else torch.nn.functional.pad(weighted, (0, size - len(weighted)))
