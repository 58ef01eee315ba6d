"""Forwards that are no straight line: reentrant recompute, a block used twice, blocks skipped at random."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from partition_toy import Toy, plan_of, train, weights
from thinwire.comm.world import World
from thinwire.partition.engine import shard
from thinwire.partition.replicated import replicate
from worlds import run_world

CUTS = ((0, 0, 1), (1, 1, 1), (-1, 0, 1))


class Straight(Toy):
    """The toy; what its blocks do to x is for others to say."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.through(self.embedding(tokens))
        return self.head(self.norm(x)) * self.scale * self.frozen.sum()

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class RecomputedAround(Straight):
    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=True)
        return x


class RecomputedInside(Straight):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            plain = block.forward
            block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=True)  # type: ignore[method-assign,misc]


class RecomputedInOne(Straight):
    """All blocks in one recomputed stretch."""

    def through(self, x: Tensor) -> Tensor:
        return checkpoint(super().through, x, use_reentrant=True)


class UsedTwice(Straight):
    def through(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        for block in (first, second, first, third, second):
            x = x + block(x)
        return x


class Skipping(Straight):
    """Stochastic depth: the same blocks are left out on every rank, others each time."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(3)

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.rand((), generator=self.chance) < 0.5:
                x = x + block(x)
        return x


MODULES: dict[str, Callable[[], Toy]] = {
    "recomputed around blocks": RecomputedAround,
    "recomputed inside blocks": RecomputedInside,
    "recomputed in one stretch": RecomputedInOne,
    "used twice": UsedTwice,
    "skipping": Skipping,
}


def _all(world: World) -> dict[tuple[str, str], Any]:
    out: dict[tuple[str, str], Any] = {}
    for name, make in MODULES.items():
        twin = replicate(make(), plan_of(world, (-1, -1, -1)), world)
        out[name, "twin"] = train(twin, world, 1, steps=4), weights(twin)
        for cut in CUTS:
            engine = shard(make(), plan_of(world, cut), world)
            out[name, str(cut)] = train(engine, world, 1, steps=4), weights(engine)
            assert cut[0] < 0 or not any(flat.gathered for unit in engine.units for flat in unit.flats)
    return out


@cache
def results() -> list[dict[tuple[str, str], Any]]:
    return run_world((2, 2), _all)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_an_unusual_forward_trains_as_the_twin_does(name: str, cut: tuple[int, int, int]) -> None:
    for result in results():
        assert result[name, str(cut)] == result[name, "twin"]


def test_skipping_skips_and_using_twice_is_another_model() -> None:
    seen = {name: results()[0][name, "twin"] for name in MODULES}
    recomputed = [seen[name] for name in MODULES if name.startswith("recomputed")]
    assert all(other == recomputed[0] for other in recomputed)
    assert len({str(seen[name]) for name in ("used twice", "skipping", "recomputed in one stretch")}) == 3
