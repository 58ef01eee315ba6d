"""One rank late in the middle of its collectives: nothing changes, and all ranks issue the same collectives in order."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from partition_toy import Toy, plan_of, train, weights
from thinwire.comm.handle import Handle
from thinwire.comm.transport.gloo import GlooTransport
from thinwire.comm.transport.same_host import Row, SameHostTransport
from thinwire.comm.transport.transport import GRADS
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world

WIRE = {"weights": {"node": "int8", "cluster": "delta-int4"}, "grads": {"node": "bf16", "cluster": "int4"}}
SETTINGS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "codecs, error feedback, kept weights": (
        (0, 0, 1),
        {"compression": WIRE | {"error_feedback": True}, "keep_gathered": True},
    ),
    "low rank": ((0, 0, 1), {"compression": {"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0}}),
    "gathers across both levels": ((1, 1, 1), {"compression": {"weights": {"cluster": "int8"}}, "keep_gathered": True}),
}
LATE = (None, 1, 2)
"""Which rank is late: none, a neighbour of rank 0 in its node, one in the other node."""
LINKS = pytest.mark.parametrize(
    "sockets",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in [(), (1,)]), (0, 1)],
    ids=["one host", "two hosts", "four hosts"],
)


@contextmanager
def late(seed: int) -> Iterator[list[float]]:
    """Random waits between this rank's receives and its sends, and before it looks whether something has arrived."""
    chance, waits = random.Random(seed), list[float]()
    plain, wait = {kind: kind._exchange for kind in (GlooTransport, SameHostTransport)}, Handle.wait

    def pause() -> None:
        if chance.random() < 0.1:
            waits.append(chance.uniform(0.001, 0.004))
            time.sleep(waits[-1])

    def held_up(exchange: Callable[..., Any]) -> Callable[..., Any]:
        """What sends `rows`, with a pause before every single message."""
        return lambda transport, received, rows, *where, **how: exchange(
            transport, received, _Pausing(rows, pause), *where, **how
        )

    def slowly(handle: Handle) -> float:
        pause()
        return wait(handle)

    for kind, exchange in plain.items():
        kind._exchange = held_up(exchange)  # type: ignore[method-assign]
    Handle.wait = slowly  # type: ignore[method-assign]
    try:
        yield waits
    finally:
        for kind, exchange in plain.items():
            kind._exchange = exchange  # type: ignore[method-assign]
        Handle.wait = wait  # type: ignore[method-assign]


class _Pausing(list[Any]):
    """Rows to send; each is handed out after a pause, when the receives are posted already."""

    def __init__(self, rows: Any, pause: Callable[[], None]) -> None:
        super().__init__(rows)
        self._pause = pause

    def __getitem__(self, index: Any) -> Any:
        self._pause()
        return super().__getitem__(index)


def _run(world: World, cut: tuple[int, int, int], more: dict[str, Any]) -> tuple[Any, list[tuple[Any, ...]]]:
    """(what training gave, the collectives that this rank issued)."""
    world.ledger.drain()
    engine = shard(Toy(), plan_of(world, cut, 2, **more), world)
    seen = train(engine, world, 2, steps=2)
    issued = [(e.level, e.kind, e.purpose, e.payload_bytes, e.codec) for e in world.ledger.drain().entries]
    return (seen, weights(engine), engine.timeline), issued


def _all(world: World) -> dict[str, Any]:
    out: dict[str, Any] = {"waits": 0}
    for name, (cut, more) in SETTINGS.items():
        out[name] = []
        for rank in LATE:
            if rank == world.rank:
                with late(seed=rank) as waits:
                    out[name].append(_run(world, cut, more))
                out["waits"] += len(waits)
            else:
                out[name].append(_run(world, cut, more))
    return out


@cache
def results(sockets: tuple[int, ...]) -> list[dict[str, Any]]:
    return run_world((2, 2), _all, sockets=sockets)


@LINKS
def test_a_late_rank_changes_nothing(sockets: tuple[int, ...]) -> None:
    assert [result["waits"] > 20 for result in results(sockets)] == [False, True, True, False], "nobody was late"
    for result in results(sockets):
        for name in SETTINGS:
            assert all(run == result[name][0] for run in result[name]), name


@LINKS
def test_all_ranks_issue_the_same_collectives_in_the_same_order(sockets: tuple[int, ...]) -> None:
    for name in SETTINGS:
        for number in range(len(LATE)):
            orders = [result[name][number][1] for result in results(sockets)]
            assert len(orders[0]) > 50
            if name == "low rank":  # messages of other sizes where matrices are cut otherwise
                orders = [[(*entry[:3], entry[4]) for entry in order] for order in orders]
            assert all(order == orders[0] for order in orders), name


def _sums(world: World) -> list[float]:
    """This rank's summed gradients; rank 0 reads the others' parts late, when it has been told of them."""
    read = Row.read

    def late_read(row: Row, into: Any) -> None:
        if world.rank == 0 and row._stream == GRADS:
            time.sleep(0.02)
        read(row, into)

    Row.read = late_read  # type: ignore[method-assign]
    compression = {"grads": {"node": "int4-hadamard"}, "block": 128}  # a block has parts of two ranks
    torch.manual_seed(world.rank)
    inputs = torch.randn(8, 16)
    torch.manual_seed(0)
    engine = shard(nn.Linear(16, 15), plan_of(world, (-1, -1, -1), compression=compression), world)
    with engine.micro_batch(last=True):
        engine.module(inputs).square().sum().backward()
    engine.finish_reduce()
    return [
        number
        for unit in engine.units
        for grads in unit.grads.values()
        if grads.complete
        for number in grads.reduced.tolist()
    ]


def test_sums_that_are_coded_on_their_way_back_are_not_written_over_before_others_have_read_them() -> None:
    sums = run_world((2, 2), _sums)
    assert all(of_rank == sums[0] for of_rank in sums)
    assert any(sums[0])
