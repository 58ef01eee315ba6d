"""The most memory that tensors take in a training step, every temporary counted, against the formula."""

import pytest
import torch
from torch import Tensor, nn

from partition_toy import adamw, plan_of
from peak import Peak
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world

WIDTH = 128
UNIT_BYTES = 4 * WIDTH * WIDTH


class Deep(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def _peak(world: World, cut: tuple[int, int, int], blocks: int) -> int:
    """Most bytes in the third step, two micro-batches of one row each: activations are next to nothing."""
    torch.manual_seed(0)
    engine = shard(Deep(blocks), plan_of(world, cut, accumulate=2), world)
    optimizer = adamw(engine)
    peak = Peak()
    with peak:
        for _ in range(3):
            peak.most = 0
            for number in range(2):
                with engine.micro_batch(last=number == 1):
                    engine.module(torch.ones(1, WIDTH)).backward()
            engine.finish_reduce()
            optimizer.step()
    engine.drain()
    return peak.most


CUTS = [(-1, -1, -1), (-1, -1, 1), (0, 0, 0), (0, 0, 1), (1, 1, 1)]


def _peaks(world: World, blocks: int) -> list[int]:
    return [_peak(world, cut, blocks) for cut in CUTS]


UNITS = {(-1, -1, -1): 3, (-1, -1, 1): 1.5, (0, 0, 0): 5, (0, 0, 1): 5, (1, 1, 1): 5.75}
"""Of gradients the one being made, the one that is read where it is and half of it as it comes; where sums are cut, their
halves; two of weights where those are cut. Whole sums that go to replicas come whole."""


@pytest.mark.parametrize("blocks", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_a_steps_peak_is_the_formulas_at_any_depth(blocks: int) -> None:
    """States as the table has them, and units of `UNITS`."""
    for peaks in run_world((2, 2), _peaks, blocks):
        for cut, most in zip(CUTS, peaks, strict=True):
            p, g, o = ((1, 2, 4)[depth + 1] for depth in cut)
            states = blocks * (1 / p + 1 / g + 2 / o)  # masters lie in the weights
            assert most / UNIT_BYTES == pytest.approx(states + UNITS[cut], rel=0.02), cut
