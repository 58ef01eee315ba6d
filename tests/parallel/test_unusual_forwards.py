"""Forwards that are no straight line: reentrant recompute, a block used twice, blocks skipped, by some ranks alone too."""

import math
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from partition_toy import Toy, plan_of, train, weights
from replicated import replicate
from thinwire.comm.world import World
from thinwire.errors import ThinwireError, UseError
from thinwire.parallel.shard.engine import shard
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


class Diverging(Straight):
    """Every rank leaves out a block of its own choice: as many as the others, or one more on rank 1."""

    def __init__(self, left_out: tuple[int, ...]) -> None:
        super().__init__()
        self.left_out = left_out

    def through(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number not in self.left_out:
                x = x + block(x)
        return x


def _diverges(world: World, cut: tuple[int, int, int]) -> str:
    engine = shard(Diverging((world.rank % 3,)), plan_of(world, cut), world)
    with pytest.raises(UseError) as told:
        train(engine, world, 1, steps=1)
    return str(told.value)


def test_ranks_that_share_weights_and_use_other_units_are_told_so() -> None:
    """The blocks are equally long: each rank would compute with the weights of another one."""
    for message in run_world(3, _diverges, (0, 0, 0)):
        found = re.match(
            r"ranks that share weights have gone different ways: rank (\d) gathers the weights of unit (blocks\.\d),",
            message,
        )
        assert found, message
        assert found[2] == ("blocks.1", "blocks.0", "blocks.0")[int(found[1])]


def _one_uses_less(world: World, folder: Path) -> None:
    deepest = len(world.cluster.levels) - 1
    engine = shard(Diverging((0, 1)[: 1 + world.rank]), plan_of(world, (deepest, deepest, deepest)), world)
    try:
        train(engine, world, 1, steps=1)
    except ThinwireError as error:
        (folder / str(world.rank)).write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.mark.parametrize("sockets", [(), (1,), (0, 1)], ids=["one host", "two hosts", "four hosts"])
@pytest.mark.parametrize("levels", [(2,), (2, 2)], ids=str)
def test_ranks_in_different_collectives_are_all_told_so_at_once(
    levels: tuple[int, ...], sockets: tuple[int, ...], tmp_path: Path
) -> None:
    """Those too that share no collective with any of them; the programs end, and do not wait until connections time out."""
    start_s = time.monotonic()
    with pytest.raises((AssertionError, RuntimeError)):
        run_world(levels, _one_uses_less, tmp_path, sockets=sockets, patience_s=300)
    assert time.monotonic() - start_s < 60
    told = [path.read_text() for path in tmp_path.iterdir()]
    assert len(told) == math.prod(levels)
    assert all(message.startswith("UseError: ranks that share weights have gone different ways") for message in told), (
        told
    )


def _paths(world: World, cut: tuple[int, int, int]) -> Any:
    def make() -> Toy:
        return Diverging((world.rank % 3,))

    twin = replicate(make(), plan_of(world, (-1, -1, -1)), world)
    engine = shard(make(), plan_of(world, cut), world)
    return (train(twin, world, 1), weights(twin)), (train(engine, world, 1), weights(engine))


@pytest.mark.parametrize("cut", [(-1, -1, -1), (-1, 0, 1), (-1, 1, 1)], ids=str)
def test_ranks_with_whole_weights_may_take_paths_of_their_own(cut: tuple[int, int, int]) -> None:
    for twin, engine in run_world((2, 2), _paths, cut):
        assert engine == twin
