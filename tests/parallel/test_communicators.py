"""One communicator per level and kind, however many units; small messages in one round or two, whichever is cheaper."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from partition_toy import plan_of
from thinwire.cluster.cluster import Cluster, Level
from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from thinwire.plan.hops import one_round_is_cheaper
from worlds import run_world

RANKS = 4
QUICK, FAR = (1e-5, 1e8), (5e-2, 1e8)
"""(seconds of latency, bytes per second) of a level: gathering 16 kB takes 1.6e-4 s more than the least there is."""
NUMBERS = 2048


def _known() -> int:
    """Communicators of this process."""
    return len(dist.distributed_c10d._world.pg_map)


class Blocks(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def _after_training(world: World, blocks: int) -> int:
    engine = shard(Blocks(blocks), plan_of(world, (0, 0, 0), compression={"grads": {"node": "int8"}}), world)
    with engine.micro_batch(last=True):
        engine.module(torch.ones(2, 4)).sum().backward()
    engine.finish_reduce()
    engine.grad_norm()
    engine.dropped()
    return _known()


def _small(world: World, link: tuple[float, float]) -> tuple[list[str], list[int], Tensor]:
    """(kinds of collective, bytes sent, sum) of a small sum over a level of such a link."""
    latency_s, bytes_per_s = link
    level = Level(name="node", fanout=RANKS, latency_s=latency_s, bytes_per_s=bytes_per_s)
    there = replace(world, cluster=Cluster(levels=(level,)))
    world.ledger.drain()
    x = torch.arange(NUMBERS, dtype=torch.float64) * (1 + world.rank)
    all_reduce_small(x, world=there)
    entries = world.ledger.drain().entries
    return [entry.kind for entry in entries], [entry.sent_bytes for entry in entries], x


def _all(world: World) -> dict[str, Any]:
    counts = [_known(), _after_training(world, 2), _after_training(world, 20)]
    return {"counts": counts, "quick": _small(world, QUICK), "far": _small(world, FAR)}


@cache
def results() -> list[dict[str, Any]]:
    return run_world(RANKS, _all)


def test_the_number_of_communicators_does_not_grow_with_units() -> None:
    for result in results():
        before, few, many = result["counts"]
        assert before == few == many == 1 + 3, "the world's, and one for gathers, reductions and small messages"


def test_small_messages_take_the_form_that_the_level_makes_cheaper() -> None:
    size = 8 * NUMBERS
    for result in results():
        kinds, sent, total = result["far"]
        assert (kinds, sent) == (["all_reduce"], [size * (RANKS - 1)])
        kinds, sent, same = result["quick"]
        assert (kinds, sent) == (["reduce_scatter", "all_gather"], [size * (RANKS - 1) // RANKS] * 2)
        assert torch.equal(total, same)
        assert torch.equal(total, torch.arange(NUMBERS, dtype=torch.float64) * 10)


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(1e-5, 1e8), (5e-2, 1e6), (1e-6, 1e10)])
@pytest.mark.parametrize("k", [2, 3, 4, 8, 64])
def test_one_round_is_taken_up_to_where_both_forms_cost_the_same(latency_s: float, bytes_per_s: float, k: int) -> None:
    """They do at S = a b k / (k - 2) bytes; between two ranks one round is never dearer."""
    even = latency_s * bytes_per_s * k / (k - 2) if k > 2 else float("inf")
    below, above = (int(even * 0.9), int(even * 1.1) + 1) if k > 2 else (1 << 40, None)
    assert one_round_is_cheaper(below, k, latency_s=latency_s, bytes_per_s=bytes_per_s)
    assert above is None or not one_round_is_cheaper(above, k, latency_s=latency_s, bytes_per_s=bytes_per_s)
