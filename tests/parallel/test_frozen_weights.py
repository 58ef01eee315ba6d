"""Frozen weights cut further than gradients: the bytes of the formula, and the same training as under any other cut."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partition_cuts import Bytes, Depths, cuts_of, formula, sent
from partition_toy import adamw, batches, weights
from replicated import Replicated, replicate
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.plan.partition import Partition
from thinwire.plan.plan import Plan
from worlds import run_world

CUTS = list(cuts_of(2, frozen_weights=True))
STEPS, BLOCKS, FROZEN, TRAINED = 2, 3, 12 * 12, 2 * 12 * 2
"""Numbers of one block that are frozen, and trained: multiples of four, so that nothing is padded."""


class Adapted(nn.Module):
    """A frozen matrix and two small trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = (nn.Linear(a, b, bias=False) for a, b in ((12, 12), (12, 2), (2, 12)))
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.base(x)) + self.up(self.down(x))


class Stack(nn.Module):
    """Adapted blocks and nothing else: every unit is gathered for forward and for backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(Adapted() for _ in range(BLOCKS))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.one_hot(tokens, 12).float()
        for block in self.blocks:
            x = block(x)
        return x


def _plan(world: World, cut: Depths, accumulate: int) -> Plan:
    names = ("replica", *world.cluster.level_names)
    params, grads, optimizer = (names[depth + 1] for depth in cut)
    partition = Partition(params=params, grads=grads, optimizer=optimizer, frozen_weights=True)
    levels = tuple((level.name, level.fanout) for level in world.cluster.levels)
    return Plan(levels=levels, partition=partition, accumulate=accumulate)


def _train(engine: Sharded | Replicated, world: World, accumulate: int) -> list[Any]:
    optimizer, seen = adamw(engine), []
    for step in range(STEPS):
        for number, (tokens, targets) in enumerate(batches(world, step, accumulate)):
            with engine.micro_batch(last=number == accumulate - 1):
                loss = F.cross_entropy(engine.module(tokens).view(-1, 12), targets.view(-1))
                loss.backward()
            seen.append(loss.item())
        engine.finish_reduce()
        seen.append(engine.grad_norm())
        optimizer.step()
    engine.drain()
    return seen


def _all(world: World) -> dict[Any, tuple[Any, Bytes, Bytes]]:
    """(losses, norms, weights), bytes sent and bytes predicted under each cut, and of the twin."""
    out: dict[Any, tuple[Any, Bytes, Bytes]] = {}
    for accumulate in (1, 3):
        for cut in CUTS:
            engine = shard(Stack(), _plan(world, cut, accumulate), world)
            world.ledger.drain()
            seen, counted = _train(engine, world, accumulate), sent(world)
            out[accumulate, cut] = ((seen, weights(engine)), counted, formula(engine, STEPS))
    twin = replicate(Stack(), _plan(world, (-1, -1, -1), 1), world)
    out["twin"] = ((_train(twin, world, 1), weights(twin)), {}, {})
    return out


@cache
def results() -> list[dict[Any, tuple[Any, Bytes, Bytes]]]:
    return run_world((2, 2), _all)


def _bytes(cut: Depths, m: int) -> Bytes:
    """By hand: what is frozen is gathered over levels 0..lp, what is trained over 0..min(lp, lg); 2 x 2 ranks, fp32."""
    lp, lg, lo = cut
    counted: Bytes = {}
    for level, name, part in ((0, "node", 2), (1, "cluster", 4)):
        frozen, trained = BLOCKS * FROZEN * 4 // part, BLOCKS * TRAINED * 4 // part
        gathered = 2 * m * (frozen * (level <= lp) + trained * (level <= min(lp, lg)))
        of_level = {
            "P-gather": gathered,
            "P-refresh": trained * (min(lp, lg) < level <= lo),
            "G-reduce": trained * (m if level <= lg else 1),
            "G-gather": trained * (level > lo),
        }
        counted[name] = {purpose: STEPS * count for purpose, count in of_level.items() if count}
    return counted


def test_the_four_more_cuts_of_two_levels_are_there() -> None:
    assert [cut for cut in CUTS if cut[1] < cut[0]] == [(0, -1, 0), (0, -1, 1), (1, -1, 1), (1, 0, 1)]


def test_every_cut_with_frozen_weights_sends_the_formulas_bytes() -> None:
    for result in results():
        for accumulate in (1, 3):
            for cut in CUTS:
                _, counted, predicted = result[accumulate, cut]
                assert counted == predicted == _bytes(cut, accumulate), (accumulate, cut)


def test_every_cut_with_frozen_weights_trains_alike() -> None:
    for result in results():
        for cut in CUTS:
            assert result[1, cut][0] == result["twin"][0], cut
            same = next(other for other in CUTS if other[1] == cut[1])
            assert result[3, cut][0] == result[3, same][0], cut
