"""Recompute around units, reentrant or not, keeps no more units whole at once at any depth."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partition_toy import plan_of
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world


class Deep(nn.Module):
    """Blocks of 64 x 65 numbers, each recomputed from outside."""

    def __init__(self, blocks: int, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(blocks))
        self.call = partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def _most(world: World, depths: tuple[int, ...]) -> dict[Any, int]:
    """(blocks, reentrant) -> most blocks whole at once, in forward or backward."""
    out = {}
    for blocks in depths:
        for reentrant in (False, True):
            torch.manual_seed(0)
            module = Deep(blocks, reentrant)
            engine = shard(module, plan_of(world, (0, 0, 0)), world)
            seen = [0]

            def watch(*_: Any) -> None:
                seen.append(sum(unit.gathered or unit.gathering is not None for unit in engine.units))  # noqa: B023

            for unit in engine.units:
                unit.entries[0].register_forward_hook(watch)
                unit.entries[0].register_full_backward_hook(watch)
            for last in (False, True):
                with engine.micro_batch(last=last):
                    module(torch.ones(2, 64, requires_grad=True)).sum().backward()
            engine.finish_reduce()
            engine.dropped()
            out[blocks, reentrant] = max(seen)
    return out


@cache
def results() -> list[dict[Any, int]]:
    return run_world(2, _most, (3, 8))


def test_recompute_around_units_keeps_two_whole_at_any_depth() -> None:
    for result in results():
        assert result[8, False] == result[3, False] == 2


def test_reentrant_recompute_around_units_keeps_two_whole_at_any_depth() -> None:
    for result in results():
        assert result[8, True] == result[3, True] == 2
