"""The driver: it issues what is asked for, each hop when the one before has arrived, always from one thread.

Small hops that are asked for together travel as one message: what every message costs, a latency and the work of starting
it, is then paid once for all of them. A rank's row is the rows of the single collectives one after another, each coded as
it says: as many bytes, and the same numbers summed in the same order. Ranks that share a hop ask for the same
collectives together, in the same order.

Shapes: k ranks of the group, n elements of one rank's chunk
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import IDENTITY, Codec
from thinwire.comm.collectives import all_gather, label_of, ledger_entry, reduce_scatter, tag_entries
from thinwire.comm.handle import Handle, InFlight
from thinwire.comm.requests import Gather, Hops, Reduce, Request
from thinwire.comm.transport.transport import joined


class Driver(InFlight):
    """Drives collectives that ask for their hops, and issues those: what may travel as one message does."""

    def _issued(self, collectives: Sequence[Hops]) -> list[tuple[Sequence[Iterator[Any]], Handle]]:
        found: list[tuple[Sequence[Iterator[Any]], Handle]] = []
        asked: dict[Hashable, tuple[list[Hops], list[Request]]] = {}
        for hops in collectives:
            item = next(hops, None)
            if isinstance(item, Handle):
                found.append(((hops,), item))
            elif item is not None:
                members, requests = asked.setdefault(item.key, ([], []))
                members.append(hops)
                requests.append(item)
        return found + [(members, issue(requests)) for members, requests in asked.values()]


def issue(requests: Sequence[Request]) -> Handle:
    """Issue requests of one key, as one message."""
    gathers = [each for each in requests if isinstance(each, Gather)]
    reduces = [each for each in requests if isinstance(each, Reduce)]
    if gathers:
        return _gather(gathers[0]) if len(gathers) == 1 else _gather_together(gathers)
    return _reduce(reduces[0]) if len(reduces) == 1 else _reduce_together(reduces)


def _gather(one: Gather) -> Handle:
    how = {"codec": one.codec, "seed": one.seed, "add": one.add, "tag": one.tag, "lasting": one.lasting}
    return all_gather(one.out, one.shard, world=one.world, level=one.level, purpose=one.purpose, **how)  # type: ignore[arg-type]


def _gather_together(requests: Sequence[Gather]) -> Handle:
    first = requests[0]
    world, level, k = first.world, first.level, first.world.fanout(first.level)
    transport = world.transport(level, "gather")
    assert transport is not None
    rows = [_coded(each.shard.reshape(-1), each.codec, each.seed) for each in requests]
    row = torch.cat(rows)
    received = row.new_empty(k, row.numel())
    size, sent = sum(each.out.nbytes for each in requests), row.nbytes * (k - 1)
    entry = ledger_entry(world, level, "all_gather", first.purpose, size, sent, first.codec)
    with world.outstanding.issuing():
        label = label_of(first.purpose, first.tag, lasting=first.lasting)
        works = transport.all_gather(received, row, label=label)

    def finish() -> None:
        parts = torch.split(received, [each.numel() for each in rows], dim=1)
        for each, part in zip(requests, parts, strict=True):
            _take(each, part)

    beside = tag_entries(world, level, transport, first.tag)
    return Handle(world.outstanding, entry, works, finish=finish, keep=(row, received), beside=beside)


def _coded(shard_n: Tensor, codec: Codec, seed: int) -> Tensor:
    """The bytes of a row."""
    return shard_n.contiguous().view(torch.uint8) if codec is IDENTITY else codec.encode(shard_n, seed=seed)


def _take(one: Gather, part: Tensor) -> None:
    """`part`, (k, bytes): what every rank has sent for this gather."""
    chunks = one.out.view(len(part), -1)
    if one.codec is IDENTITY:
        chunks.view(torch.uint8).copy_(part)
        return
    for chunk, coded in zip(chunks, part, strict=True):
        one.codec.sum_into(coded.clone().unsqueeze(0), chunk, add=one.add)  # a copy, so that its numbers are aligned


def _reduce(one: Reduce) -> Handle:
    how = {"codec": one.codec, "seed": one.seed, "tag": one.tag}
    handle = reduce_scatter(one.out, one.full, world=one.world, level=one.level, purpose=one.purpose, **how)  # type: ignore[arg-type]
    one.let_go()
    return handle


def _reduce_together(requests: Sequence[Reduce]) -> Handle:
    first, outs = requests[0], [each.out for each in requests]
    world, level, k = first.world, first.level, first.world.fanout(first.level)
    transport, label = world.transport(level, "reduce"), label_of(first.purpose, first.tag)
    assert transport is not None
    full = [joined([piece.reshape(-1) for piece in each.pieces], k) for each in requests]
    size = sum(each.nbytes for each in full)
    if first.codec is not IDENTITY:
        full = [
            torch.stack([each.codec.encode(chunk, seed=each.seed) for chunk in rows])
            for each, rows in zip(requests, full, strict=True)
        ]
    lengths = [rows.shape[1] for rows in full]
    sent = torch.cat(full, dim=1)
    for each in requests:
        each.let_go()
    entry = ledger_entry(world, level, "reduce_scatter", first.purpose, size, sent.nbytes // k * (k - 1), first.codec)
    if first.codec is IDENTITY:
        total = outs[0].new_empty(sum(lengths))
        with world.outstanding.issuing():
            issued = transport.reduce_scatter(total, [sent.view(-1)], label=label)

        def deal_out() -> None:
            if issued.finish is not None:
                issued.finish()
            for out, part in zip(outs, torch.split(total, lengths), strict=True):
                out.view(-1).copy_(part)

        return Handle(world.outstanding, entry, issued.works, finish=deal_out, keep=(*issued.keep, total))
    received = torch.empty_like(sent)
    with world.outstanding.issuing():
        works = transport.all_to_all(received, sent, label=label)

    def decode() -> None:
        for each, part in zip(requests, torch.split(received, lengths, dim=1), strict=True):
            each.codec.sum_into(part.contiguous(), each.out.view(-1))

    return Handle(world.outstanding, entry, works, finish=decode, keep=(sent, received))
