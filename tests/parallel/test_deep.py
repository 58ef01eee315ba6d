"""A model with more units than a socket between two ranks holds messages of: every rank posts all before anybody reads."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partition_toy import adamw, plan_of, weights
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world

UNITS = 300


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(UNITS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.01 * block(x).tanh()
        return x


def _trained(world: World, cut: tuple[int, int, int]) -> tuple[list[tuple[float, float]], bytes]:
    """(loss and gradient norm of two steps, a hash of the weights they end with)."""
    engine = shard(Deep(), plan_of(world, cut), world)
    optimizer, seen = adamw(engine), []
    for _ in range(2):
        with engine.micro_batch(last=True):
            loss = engine.module(torch.full((2, 8), 1.0 + world.rank)).square().mean()
            loss.backward()
        engine.finish_reduce()
        seen.append((loss.item(), engine.grad_norm()))
        optimizer.step(grad_scale=0.1)
    engine.drain()
    return seen, weights(engine)


def _ends(world: World) -> list[Any]:
    """Under the least and the most cut partition."""
    last = len(world.cluster.levels) - 1
    return [_trained(world, (depth,) * 3) for depth in (-1, last)]


def _every(world: World) -> list[Any]:
    """Under every legal partition."""
    depths = range(-1, len(world.cluster.levels))
    cuts = [(p, g, o) for o in depths for g in depths for p in depths if p <= g <= o]
    return [_trained(world, cut) for cut in cuts]


def test_any_number_of_units_trains_whole_and_cut_with_the_same_bits() -> None:
    for whole, cut in run_world((2,), _ends, timeout_s=280):
        assert whole == cut


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "partitions"), [((2,), 4), ((2, 2), 10)], ids=["2", "2x2"])
def test_any_number_of_units_trains_under_every_partition_with_the_same_bits(
    levels: tuple[int, ...], partitions: int
) -> None:
    for results in run_world(levels, _every, timeout_s=280):
        assert len(results) == partitions
        assert all(result == results[0] for result in results)
