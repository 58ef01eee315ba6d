"""Sums of low rank: exact where the rank allows it, nothing lost over time, equal replicas, bytes by the formula."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from thinwire.comm.driver import Driver
from thinwire.comm.lowrank import LowRank, Matrix
from thinwire.comm.requests import all_reduce_hops
from thinwire.comm.world import World
from worlds import run_world

MATRICES = [Matrix(3, 20, 12), Matrix(243, 16, 30)]
N = 730
RANK = 2


def summer(world: World, rank: int = RANK) -> LowRank:
    return LowRank(
        MATRICES,
        N,
        rank=rank,
        level=0,
        fanout=world.fanout(0),
        all_reduce=partial(all_reduce_hops, world=world, level=0, purposes=("reduce", "gather")),
        device=torch.device("cpu"),
    )


def summed(low_rank: LowRank, part: Tensor, where: slice = slice(None)) -> Tensor:
    out = torch.full((len(range(N)[where]),), math.nan)
    Driver(low_rank.reduce(out, part, where)).finish()
    return out


def random_part(number: int, step: int, rank: int | None = None) -> Tensor:
    """Other numbers on every rank (its number); with a rank, matrices whose sum over the ranks has it."""
    shared = torch.Generator().manual_seed(step)
    own = torch.Generator().manual_seed(1000 * step + number + 1)
    part = torch.randn(N, generator=own)
    if rank is not None:
        for m in MATRICES:
            columns = torch.randn(m.rows, rank, generator=shared)
            part[m.start : m.end] = (columns @ torch.randn(rank, m.columns, generator=own)).view(-1)
    return part


def total(world: World, step: int, rank: int | None = None) -> Tensor:
    """The sum of all ranks' parts."""
    return torch.stack([random_part(number, step, rank) for number in range(world.size)]).sum(0)


def _exact(world: World, step: int) -> float:
    part = random_part(world.rank, step, rank=RANK)
    low_rank = summer(world)
    got = summed(low_rank, part)
    low_rank.applied()
    assert low_rank.residual.value is not None
    assert torch.allclose(low_rank.residual.value, torch.zeros(N), atol=1e-4)
    return float((got - total(world, step, RANK)).abs().max())


@pytest.mark.parametrize("step", [1, 2])
def test_matrices_of_no_more_than_the_rank_are_summed_exactly(step: int) -> None:
    assert max(run_world(3, _exact, step)) < 1e-4


def _over_time(world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low_rank = summer(world)
    put_in, out = torch.zeros(N), torch.zeros(N)
    for step in range(8):
        part = random_part(world.rank, step)
        put_in += part
        out += summed(low_rank, part)
        low_rank.applied()
    last = summed(low_rank, torch.zeros(N))  # what is left goes on being sent
    low_rank.dropped()
    assert low_rank.residual.value is not None
    return put_in, out, low_rank.residual.value, last


def test_what_was_sent_and_what_is_left_is_what_was_put_in() -> None:
    results = run_world(3, _over_time)
    put_in = torch.stack([result[0] for result in results]).sum(0)
    left = torch.stack([result[2] for result in results]).sum(0)
    assert left.abs().max() > 1
    for _, out, _, last in results:
        assert torch.equal(out, results[0][1]), "replicas differ"
        assert torch.allclose(out + left, put_in, atol=1e-3)
        assert last.norm() > 0.3 * left.norm()
    rest = torch.ones(N, dtype=torch.bool)
    for m in MATRICES:
        rest[m.start : m.end] = False
    assert rest.sum() == 10
    assert torch.allclose(results[0][1][rest], put_in[rest], atol=1e-5), "what is no matrix is summed as it is"


def _skipped(world: World) -> None:
    kept, other = summer(world), summer(world)
    for low_rank in (kept, other):
        summed(low_rank, random_part(world.rank, 0))
        low_rank.applied()
    summed(other, torch.full((N,), math.nan))
    other.dropped()
    assert torch.equal(summed(kept, random_part(world.rank, 1)), summed(other, random_part(world.rank, 1)))


def test_a_step_that_is_not_taken_leaves_no_trace() -> None:
    run_world(2, _skipped)


def _recovers(world: World) -> float:
    low_rank = summer(world)
    for _ in range(2):
        summed(low_rank, torch.zeros(N))
        low_rank.applied()
    part = random_part(world.rank, 3, rank=1)
    sent = torch.zeros(N)
    for step in range(3):
        sent += summed(low_rank, part if step == 0 else torch.zeros(N))
        low_rank.applied()
    return float((sent - total(world, 3, rank=1)).abs().max())


def test_matrices_that_were_zero_are_sent_when_they_are_not() -> None:
    assert max(run_world(2, _recovers)) < 1e-4


def _bytes(world: World) -> None:
    low_rank = summer(world)
    world.ledger.drain()
    whole = summed(low_rank, random_part(world.rank, 1))
    entries = world.ledger.drain().sent_bytes()["node"]
    k, p, q = world.size, 10 + RANK * (20 + 16), RANK * (12 + 30)
    assert low_rank.lengths == (p, q)
    assert entries == dict.fromkeys(("reduce", "gather"), 4 * (k - 1) * (-(-p // k) - (-q // k)))
    assert sum(entries.values()) < 0.4 * 2 * 4 * N * (k - 1) / k
    shard = slice(100, 400)
    assert torch.equal(summed(low_rank, random_part(world.rank, 1), shard), whole[shard])


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_those_of_two_small_all_reduces(ranks: int) -> None:
    run_world(ranks, _bytes)


def _warm(world: World) -> list[float]:
    """How much of the same matrix each step's first part catches: warm Q is a power iteration."""
    low_rank, part = summer(world, rank=1), random_part(world.rank, 5)
    m = MATRICES[1]
    caught = []
    for _ in range(12):
        got = summed(low_rank, part)[m.start : m.end]
        caught.append(float(got.norm()))
        low_rank.applied()
        low_rank.residual.value = None
    best = float(torch.linalg.svdvals(total(world, 5)[m.start : m.end].view(m.rows, m.columns))[0])
    return [caught[0] / best, caught[-1] / best]


def test_a_warm_start_finds_the_largest_singular_value() -> None:
    for first, last in run_world(2, _warm):
        assert first < 0.97
        assert last == pytest.approx(1.0, abs=0.03)
