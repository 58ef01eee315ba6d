"""The collectives against their references, in value and in bytes."""

import pytest
import torch
import torch.distributed as dist

import reference
from thinwire.comm.collectives import all_gather, all_reduce, all_reduce_small, reduce_scatter
from thinwire.comm.world import World
from worlds import run_world


def _against_twins(world: World) -> dict[str, dict[str, int]]:
    torch.manual_seed(world.rank)
    for level in range(len(world.cluster.levels)):
        k, n = world.fanout(level), 1000
        shard, full = torch.randn(n), torch.randn(k * n)
        gathered, reduced = torch.empty(k * n), torch.empty(n)
        first = all_gather(gathered, shard, world=world, level=level, purpose="gather")
        second = reduce_scatter(reduced, full, world=world, level=level, purpose="reduce")
        first.wait()
        second.wait()
        assert torch.equal(gathered, reference.all_gather(shard, world=world, level=level))
        assert torch.allclose(reduced, reference.reduce_scatter(full, world=world, level=level), atol=1e-5)
        for x in (torch.randn(777), torch.randn(k * 120), torch.randn(k * 60, 2).t(), torch.randn(0)):
            expected = reference.all_reduce(x, world=world, level=level)
            all_reduce(x, world=world, level=level, purpose="sum")
            assert torch.allclose(x, expected, atol=1e-5)
    return world.ledger.drain().sent_bytes()


@pytest.mark.parametrize("sockets", [(), (0, 1)], ids=["neighbours", "sockets"])
@pytest.mark.parametrize("levels", [(1,), (2,), (3,), (2, 2), (1, 2), (2, 1)])
def test_collectives_equal_their_twins_and_send_the_least_bytes(
    levels: tuple[int, ...], sockets: tuple[int, ...]
) -> None:
    for sent in run_world(levels, _against_twins, sockets=sockets):
        for name, k in zip(("node", "cluster"), levels, strict=False):
            if k == 1:
                assert name not in sent
                continue
            padded = -(-777 // k) * k
            assert sent[name]["gather"] == sent[name]["reduce"] == 4 * 1000 * (k - 1)
            assert sent[name]["sum"] == 2 * 4 * (padded // k + 2 * 120) * (k - 1)


def _large(world: World) -> tuple[bool, int, int]:
    """(is the sum right, collectives, bytes sent) of an all-reduce of 12 MiB for two ranks, 18 MiB for three."""
    x = torch.randn(world.size * 6 * 2**18, generator=torch.Generator().manual_seed(world.rank))
    expected = reference.all_reduce(x, world=world, level=0)
    all_reduce(x, world=world, level=0, purpose="sum")
    entries = world.ledger.drain().entries
    return torch.allclose(x, expected, atol=1e-5), len(entries), sum(entry.sent_bytes for entry in entries)


@pytest.mark.parametrize(("ranks", "sockets", "pieces"), [(2, (0,), 3), (3, (0,), 4), (2, (), 1)])
def test_a_large_sum_over_a_link_goes_in_pieces_of_the_same_bytes(
    ranks: int, sockets: tuple[int, ...], pieces: int
) -> None:
    for right, collectives, sent in run_world(ranks, _large, sockets=sockets):
        assert right and collectives == 2 * pieces
        assert sent == 2 * 4 * 6 * 2**18 * (ranks - 1)


def _in_place(world: World) -> bool:
    out = torch.zeros(2 * 5)
    mine = out[world.coordinate(0) * 5 :][:5]
    mine.fill_(world.rank + 1)
    all_gather(out, mine, world=world, level=0, purpose="gather").wait()
    return out.tolist() == [1.0] * 5 + [2.0] * 5


def test_a_gather_may_be_in_place() -> None:
    assert all(run_world(2, _in_place))


def _reduced_in_place(world: World) -> tuple[list[float], list[float]]:
    """What a reduction into this rank's own chunk leaves there, and the same sum in rank order by hand."""
    everybodys = [torch.randn(3 * 5, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    mine = slice(5 * world.rank, 5 * world.rank + 5)
    full = everybodys[world.rank].clone()
    reduce_scatter(full[mine], full, world=world, level=0, purpose="reduce").wait()
    first, second, third = (each[mine] for each in everybodys)
    return full[mine].tolist(), ((first + second) + third).tolist()


def test_a_reduction_may_be_in_place_and_adds_in_the_order_of_the_ranks() -> None:
    for seen, expected in run_world(3, _reduced_in_place):
        assert seen == expected


def _small(world: World) -> tuple[list[float], list[float]]:
    total = torch.tensor([1.0, 0.1 * world.rank], dtype=torch.float64)
    largest = torch.tensor([float(world.rank)])
    all_reduce_small(total, world=world)
    all_reduce_small(largest, world=world, op="max")
    return total.tolist(), largest.tolist()


@pytest.mark.parametrize("levels", [(1,), (4,), (2, 2)])
def test_small_sums_and_maxima_are_the_same_bits_on_all_ranks(levels: tuple[int, ...]) -> None:
    results = run_world(levels, _small)
    ranks = len(results)
    assert all(result == results[0] for result in results)
    assert results[0][0] == pytest.approx([ranks, 0.1 * sum(range(ranks))])
    assert results[0][1] == [ranks - 1]


def _drop(world: World) -> None:
    all_gather(torch.empty(4), torch.ones(2), world=world, level=0, purpose="gather")
    dist.barrier()  # nobody leaves before all have issued it


def test_a_handle_nobody_waits_for_is_found() -> None:
    with pytest.raises(AssertionError, match="never waited for"):
        run_world(2, _drop)


def _fixed_order(world: World) -> list[bytes]:
    torch.manual_seed(world.rank)
    full = torch.randn(4 * 64) * 10 ** torch.randn(4 * 64)
    out = torch.empty(64)
    reduce_scatter(out, full, world=world, level=0, purpose="reduce").wait()
    parts = reference.all_gather(full, world=world, level=0).view(4, 4, 64)[:, world.rank]
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    return [out.numpy().tobytes(), expected.numpy().tobytes()]


def test_a_reduction_sums_in_rank_order_bit_for_bit() -> None:
    for mine, expected in run_world(4, _fixed_order):
        assert mine == expected
