"""Collectives of one level. Each returns a Handle, and the ledger has an entry for it before the first byte leaves.

A group of k ranks; V bytes in the whole tensor. All-gather and reduce-scatter send V (k-1)/k from each rank, the least
possible. Sums on CPUs are in the order of the ranks: deterministic, and the same bits whoever owns the result. How rows
travel is decided by the level's `Transport` alone. `tests/reference.py` has the references that tests compare with.

Shapes: k ranks of the group, n elements of one rank's chunk
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import IDENTITY, Codec
from thinwire.comm.handle import Handle
from thinwire.comm.ledger import Entry
from thinwire.comm.transport.transport import (
    GRADS,
    OTHERS,
    WEIGHTS,
    Label,
    TaggedTransport,
    Transport,
    all_gather_single,
    joined,
)
from thinwire.comm.world import World
from thinwire.plan.hops import G_GATHER, G_REDUCE, P_GATHER, one_round_is_cheaper


def all_gather(
    out_kn: Tensor,
    shard_n: Tensor,
    *,
    world: World,
    level: int,
    purpose: str,
    codec: Codec = IDENTITY,
    seed: int = 0,
    add: bool = False,
    tag: int = 0,
    lasting: bool = False,
) -> Handle:
    """`out_kn` becomes the chunks of all ranks of the group in order; this rank's is `shard_n`.

    `shard_n` may be the right part of `out_kn` itself. With a codec every rank, the owner too, decodes what was sent,
    so that all hold the same bits (stochastic rounding draws
    from `seed`); with `add` too, it is added to what `out_kn` holds.

    A `lasting` shard is left with the others until `World.settle`: it must not be written to before. If other ranks mean
    another `tag` (0: none), waiting raises OtherExchangeError, except on accelerators.
    """
    transport, k = world.transport(level, "gather"), world.fanout(level)
    assert not add or (codec is not IDENTITY and transport is not None)
    assert out_kn.numel() == k * shard_n.numel(), (out_kn.shape, shard_n.shape, k)
    if transport is None:
        return _alone(world, out_kn, shard_n)
    n, label = shard_n.numel(), Label(_stream(purpose), tag, lasting)
    beside = [_control(world, level, transport)] if tag and transport.header_bytes else []
    if codec is IDENTITY:
        entry = _entry(world, level, "all_gather", purpose, out_kn.nbytes, shard_n.nbytes * (k - 1), codec)
        with world.outstanding.issuing():
            works = transport.all_gather(out_kn.view(k, n), shard_n.reshape(-1), label=label)
        return Handle(world.outstanding, entry, works, keep=(out_kn, shard_n), beside=beside)
    coded = codec.encode(shard_n.reshape(-1), seed=seed)
    received = torch.empty(k * coded.numel(), dtype=torch.uint8, device=coded.device)
    entry = _entry(world, level, "all_gather", purpose, out_kn.nbytes, coded.nbytes * (k - 1), codec)
    with world.outstanding.issuing():
        works = transport.all_gather(received.view(k, -1), coded, label=label)

    def finish() -> None:
        for part, chunk in zip(out_kn.view(k, n), received.view(k, 1, -1), strict=True):
            codec.sum_into(chunk, part, add=add)

    return Handle(world.outstanding, entry, works, finish=finish, keep=(coded, received), beside=beside)


def compare(tag: int, *, world: World, levels: Sequence[int]) -> None:
    """Raises OtherExchangeError if a rank that these levels join is in a tagged gather, or compares another tag.

    Of levels whose exchanges have no tags nothing is compared, see `World.has_tags`.
    """
    for level in levels:
        transport = world.transport(level, "gather")
        if isinstance(transport, TaggedTransport):
            entry = _control(world, level, transport) if transport.header_bytes else None
            with world.outstanding.issuing():
                works = transport.compare(tag)
            Handle(world.outstanding, entry, works).wait()


def _control(world: World, level: int, transport: Transport) -> Entry:
    sent = transport.header_bytes
    return _entry(world, level, "all_gather", "control", sent, sent, IDENTITY)


def _stream(purpose: str) -> int:
    return WEIGHTS if purpose == P_GATHER else GRADS if purpose in (G_REDUCE, G_GATHER) else OTHERS


def reduce_scatter(
    out_n: Tensor,
    full_kn: Tensor | Sequence[Tensor],
    *,
    world: World,
    level: int,
    purpose: str,
    codec: Codec = IDENTITY,
    seed: int = 0,
    tag: int = 0,
) -> Handle:
    """`out_n` becomes the sum over the group of everybody's chunk number (this rank's coordinate) of `full_kn`.

    Sums are in `out_n`'s precision and in rank order. `out_n` may be this rank's own chunk of `full_kn`, which may be given
    in flat pieces that follow one another: on one host they are read from where they are. What other ranks send under
    another `tag` is never added up (see `Transport.all_to_all`).
    """
    transport, k = world.transport(level, "reduce"), world.fanout(level)
    n, label = out_n.numel(), Label(_stream(purpose), tag)
    pieces = [full_kn.reshape(-1)] if isinstance(full_kn, Tensor) else full_kn
    assert sum(piece.numel() for piece in pieces) == k * n, (n, k)
    if transport is None:
        return _alone(world, out_n, joined(pieces, k))
    size = sum(piece.nbytes for piece in pieces)
    if codec is IDENTITY:
        entry = _entry(world, level, "reduce_scatter", purpose, size, size // k * (k - 1), codec)
        with world.outstanding.issuing():
            issued = transport.reduce_scatter(out_n, pieces, label=label)
        return Handle(world.outstanding, entry, issued.works, finish=issued.finish, keep=issued.keep)
    sent = torch.stack([codec.encode(chunk, seed=seed) for chunk in joined(pieces, k)])
    received = torch.empty_like(sent)
    entry = _entry(world, level, "reduce_scatter", purpose, size, sent.nbytes // k * (k - 1), codec)
    with world.outstanding.issuing():
        works = transport.all_to_all(received, sent, label=label)
    finish = partial(codec.sum_into, received, out_n.view(-1))
    return Handle(world.outstanding, entry, works, finish=finish, keep=(sent, received))


def all_reduce(x: Tensor, *, world: World, level: int, purpose: str, codec: Codec = IDENTITY) -> None:
    """Sum `x` over the group of a level, in place: reduce-scatter and all-gather, waited for.

    Over a link in pieces, all on their way at once: one is summed and gathered while the next still arrives. Of a padded
    copy, if `x` is not contiguous or its elements cannot be dealt out evenly.
    """
    transport, k = world.transport(level, "reduce"), world.fanout(level)
    if transport is None:
        return
    n = -(-x.numel() // k)
    in_place = x.is_contiguous() and x.numel() == k * n
    whole = x.view(-1) if in_place else torch.zeros(k * n, dtype=x.dtype, device=x.device)
    if not in_place:
        whole[: x.numel()] = x.reshape(-1)
    count = transport.pieces_of(whole) if codec is IDENTITY else 1
    pieces = whole.view(count, k, n // count)
    how: dict[str, Any] = {"world": world, "level": level, "purpose": purpose, "codec": codec}
    own = pieces[:, world.coordinate(level)]
    sums = [reduce_scatter(mine, piece, **how) for mine, piece in zip(own, pieces, strict=True)]
    gathers = []
    for summed, mine, piece in zip(sums, own, pieces, strict=True):
        summed.wait()
        gathers.append(all_gather(piece, mine, **how))
    for gathered in gathers:
        gathered.wait()
    if not in_place:
        x.copy_(whole[: x.numel()].view_as(x))


def all_reduce_hops(message_m: Tensor, *, world: World, level: int, purposes: tuple[str, str]) -> Iterator[Handle]:
    """Sum `message_m` in place, m a multiple of the group's ranks: yields each of its two hops when it is issued.

    An empty message has its hops too, without bytes: ranks whose message is empty go on hop by hop with the others.
    """
    reducing, gathering = purposes
    if message_m.numel():
        shard = message_m.new_empty(message_m.numel() // world.fanout(level))
        yield reduce_scatter(shard, message_m, world=world, level=level, purpose=reducing)
        yield all_gather(message_m, shard, world=world, level=level, purpose=gathering)
        return
    for kind, purpose in zip(("reduce_scatter", "all_gather"), purposes, strict=True):
        entry = world.ledger.open(
            level=world.level_name(level), kind=kind, purpose=purpose, payload_bytes=0, sent_bytes=0, codec="identity"
        )
        yield Handle(world.outstanding, entry, [])


def all_reduce_small(
    x: Tensor,
    *,
    world: World,
    op: Literal["sum", "max"] = "sum",
    purpose: str = "control",
    levels: Sequence[int] | None = None,
) -> None:
    """Sum or maximum of a small CPU tensor over all ranks (or the given `levels`), in place; the same bits on all of them.

    Level by level, inner to outer, each in the form that the level's latency and rate make cheaper: everybody gathers
    everything in one round and reduces locally in rank order, or (for larger tensors) reduce-scatter and all-gather.
    """
    for level in range(len(world.cluster.levels)) if levels is None else levels:
        group, k = world.group(level, "small"), world.fanout(level)
        if group is None:
            continue
        link = world.cluster.levels[level]
        one_round = one_round_is_cheaper(x.nbytes, k, latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)
        if op == "sum" and x.device == world.device and not one_round:
            all_reduce(x, world=world, level=level, purpose=purpose)
            continue
        gathered = torch.empty(k, x.numel(), dtype=x.dtype)
        gather_small(gathered, x, world=world, level=level, purpose=purpose).wait()
        total = gathered[0].clone()
        for other in gathered[1:]:
            total = total + other if op == "sum" else torch.maximum(total, other)
        x.copy_(total.view_as(x))


def gather_small(out_kn: Tensor, x_n: Tensor, *, world: World, level: int, purpose: str) -> Handle:
    """`out_kn` becomes everybody's `x_n`, a few numbers on the CPU, at a level that joins more than one member."""
    sent = x_n.nbytes * (world.fanout(level) - 1)
    entry = _entry(world, level, "all_reduce", purpose, x_n.nbytes, sent, IDENTITY)
    group = world.group(level, "small")
    assert group is not None
    work = all_gather_single(out_kn.view(-1), x_n.reshape(-1), group=group)
    return Handle(world.outstanding, entry, [work])


def _alone(world: World, out: Tensor, source: Tensor) -> Handle:
    """A level of one member is as if it were not there: nothing is coded, nothing is sent."""
    if out.data_ptr() != source.data_ptr() or out.dtype != source.dtype:
        out.copy_(source.view_as(out))
    return Handle(world.outstanding, None, [])


def _entry(
    world: World, level: int, kind: str, purpose: str, payload_bytes: int, sent_bytes: int, codec: Codec
) -> Entry:
    return world.ledger.open(
        level=world.level_name(level),
        kind=kind,
        purpose=purpose,
        payload_bytes=payload_bytes,
        sent_bytes=sent_bytes,
        codec=codec.name,
    )
