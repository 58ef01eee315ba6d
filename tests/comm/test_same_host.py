"""Ranks of one host that read each other's memory: found by trying, right in any order of waiting, gone with a word."""

import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import reference
from thinwire.comm.collectives import all_gather, reduce_scatter
from thinwire.comm.transport import connect
from thinwire.comm.transport.local_socket import LocalSocket
from thinwire.comm.transport.process_memory import Run, read_memory
from thinwire.comm.transport.same_host import Exchanges
from thinwire.comm.world import World
from thinwire.errors import LinkError
from thinwire.train.launch import describe
from worlds import run_world

N = 300_000


def _waited_backwards(world: World) -> bool:
    """Exchanges of both levels in flight together, waited for in another order than issued, and that by rank."""
    assert world.reads_memory(0) and world.reads_memory(1)
    torch.manual_seed(world.rank)
    handles, sources, expected, outs = [], [], [], []
    for level in (0, 1, 0, 1):
        shard, full = torch.randn(N), torch.randn(2 * N)
        outs += [torch.empty(2 * N), torch.empty(N)]
        handles.append(all_gather(outs[-2], shard, world=world, level=level, purpose="gather"))
        handles.append(reduce_scatter(outs[-1], full, world=world, level=level, purpose="reduce"))
        sources += [shard, full]
        expected += [
            reference.all_gather(shard, world=world, level=level),
            reference.reduce_scatter(full, world=world, level=level),
        ]
    turn = 2 * world.rank
    for number in reversed(list(range(8))[turn:] + list(range(8))[:turn]):
        handles[number].wait()
        sources[number].fill_(torch.nan)  # what has been waited for is this rank's own again
    return all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


def test_exchanges_may_be_waited_for_in_any_order() -> None:
    assert all(run_world((2, 2), _waited_backwards))


def _in_pieces(world: World, sizes: Sequence[int]) -> bool:
    """A reduce-scatter of flat pieces, against that of the whole; into this rank's own chunk of them where that is one."""
    torch.manual_seed(world.rank)
    pieces = [torch.randn(size) for size in sizes]
    whole = torch.cat(pieces)
    chunks = reference.all_gather(whole, world=world, level=0).view(world.size, world.size, -1)[:, world.rank]
    expected = (chunks[0] + chunks[1]) + chunks[2]
    out = torch.empty_like(expected)
    reduce_scatter(out, pieces, world=world, level=0, purpose="reduce").wait()
    own = whole.view(world.size, -1)[world.rank]
    reduce_scatter(own, whole, world=world, level=0, purpose="reduce").wait()
    far = torch.empty_like(expected)
    reduce_scatter(far, pieces, world=world.through_sockets([0]), level=0, purpose="reduce").wait()
    return all(torch.equal(expected, found) for found in (out, own, far))


@pytest.mark.parametrize("sizes", [(12,), (0, 5, 1, 0, 6), (7, N, N - 7, N), tuple([3] * 200), (0,)])
def test_gradients_are_added_up_from_where_they_are_in_the_order_of_ranks(sizes: Sequence[int]) -> None:
    """In one piece and in several, in more than are read one by one, longer than a chunk, and none at all."""
    assert all(run_world(3, _in_pieces, sizes))


def _one_is_behind(world: World, exchanges: int) -> list[float]:
    """Rank 1 waits for its first exchange when rank 0 has waited for as many as it can, and has thrown its rows away."""
    near = world.among(range(2), world.cluster, kept=exchanges)
    out = torch.zeros(exchanges, 2)
    handles = [
        all_gather(row, torch.full((1,), 10.0 * number + world.rank), world=near, level=0, purpose="gather")
        for number, row in enumerate(out)
    ]
    ahead = torch.zeros(1)
    for handle in handles if world.rank == 0 else []:
        handle.wait()
    dist.broadcast(ahead, 0, group=world.group(0, "small"))
    for handle in handles if world.rank == 1 else []:
        handle.wait()
    return out.flatten().tolist()


def test_a_rank_that_keeps_its_rows_does_not_wait_for_those_that_have_yet_to_read_them() -> None:
    expected = [float(10 * number + rank) for number in range(3) for rank in range(2)]
    assert run_world(2, _one_is_behind, 3, timeout_s=30) == [expected] * 2


def _one_cannot_read(world: World) -> bool:
    def reads(into: torch.Tensor, pid: int, runs: Sequence[Run]) -> bool:
        return world.rank != 1 and read_memory(into, pid, runs)

    connect.read_memory = reads
    group = world.group(0, "small")
    assert group is not None
    return connect.find_same_host(group, Exchanges(), timeout_s=10) is None


def test_where_one_rank_cannot_read_nobody_does() -> None:
    assert run_world(3, _one_cannot_read) == [True] * 3


def _one_dies(world: World, told: Path) -> None:
    out = torch.empty(2 * N)
    if world.rank == 1:
        os._exit(9)
    handle = all_gather(out, torch.ones(N), world=world, level=0, purpose="gather")
    try:
        handle.wait()
    except LinkError as error:
        assert describe(0, error).cascade, "it is the other rank's failure"
        told.write_text(str(error))
    raise AssertionError


def test_a_rank_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        run_world(2, _one_dies, tmp_path / "told", timeout_s=60)
    assert re.match(
        r"rank 1 \(host .*, pid \d+\) has ended: the all-gather \(gather\)", (tmp_path / "told").read_text()
    )


@pytest.fixture
def ends() -> Iterator[Sequence[socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def test_a_socket_receives_each_kind_in_order_however_the_bytes_arrive(ends: Sequence[socket.socket]) -> None:
    here, there = ends
    sender, local = LocalSocket(here, 5), LocalSocket(there, 5)
    sender.send((1, 10, 3))
    sender.send((2, -1, 0), (1, 2**62, -5), (2, 0, 2**40))
    assert [local.receive(2), local.receive(2), local.receive(1), local.receive(1)] == [
        (-1, 0),
        (0, 2**40),
        (10, 3),
        (2**62, -5),
    ]
    message = b"\x01" + (77).to_bytes(8, "little") + (78).to_bytes(8, "little")
    here.sendall(message[:4])
    there.setblocking(True)
    here.sendall(message[4:] + message)
    assert [local.receive(1), local.receive(1)] == [(77, 78), (77, 78)]


def test_a_socket_tells_of_an_end_that_is_gone_or_silent(ends: Sequence[socket.socket]) -> None:
    here, there = ends
    local = LocalSocket(there, 0.05)
    with pytest.raises(LinkError, match="lost a rank of this host while waiting for it: timed out"):
        local.receive(1)
    here.close()
    with pytest.raises(LinkError, match="closed its connection"):
        local.receive(1)
    local.send((1, 0, 0))
    with pytest.raises(LinkError, match="lost a rank of this host"):
        local.receive(1)


def test_the_last_messages_of_an_end_that_is_gone_are_received_though_nothing_can_be_sent_to_it(
    ends: Sequence[socket.socket],
) -> None:
    here, there = ends
    gone, local = LocalSocket(here, 5), LocalSocket(there, 5)
    gone.send((1, 7, 8))
    gone.close()
    local.send((2, 0, 0))
    assert local.receive(1) == (7, 8)
    with pytest.raises(LinkError, match="lost a rank of this host"):
        local.receive(1)


def test_sending_never_blocks_however_much_is_unread(ends: Sequence[socket.socket]) -> None:
    """Both ends send 20,000 messages, more than a socket holds by far, before either receives one."""
    one, other = LocalSocket(ends[0], 5), LocalSocket(ends[1], 5)
    for number in range(20_000):
        one.send((1, number, -number))
        other.send((1, number, number))
    assert [other.receive(1) for _ in range(20_000)] == [(number, -number) for number in range(20_000)]
    assert [one.receive(1) for _ in range(20_000)] == [(number, number) for number in range(20_000)]


def test_memory_that_is_not_there_is_not_read() -> None:
    source, into = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    whole = [(source.data_ptr(), source.nbytes)]
    assert read_memory(into, os.getpid(), whole)
    assert torch.equal(into, source)
    assert not read_memory(into, os.getpid(), [(8, source.nbytes)])
    assert not read_memory(into, 2**22 + 1, whole)


@pytest.mark.parametrize("runs", [1, 7, 2500])
def test_memory_in_many_runs_is_read_in_their_order(runs: int) -> None:
    """The kernel takes 1,024 of them in one call."""
    source, into = torch.arange(5000), torch.zeros(5000, dtype=torch.int64)
    parts = list(source.tensor_split(runs))[::-1]
    assert read_memory(into, os.getpid(), [(part.data_ptr(), part.nbytes) for part in parts])
    assert torch.equal(into, torch.cat(parts))
