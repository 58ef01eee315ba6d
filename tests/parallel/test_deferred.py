"""A module on the meta device: its units get their values one by one, the same bits as a module that was whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partition_toy import Toy, plan_of, train, weights
from peak import Peak
from thinwire.comm.world import World
from thinwire.errors import UseError
from thinwire.parallel.shard.engine import Sharded, shard
from worlds import cluster_of, run_world

CUTS = [(-1, -1, -1), (-1, 0, 1), (0, 0, 1), (1, 1, 1)]
WIDTH = 128
UNIT_BYTES = 4 * WIDTH * WIDTH


def _both(world: World, cut: tuple[int, int, int], precision: str) -> Any:
    plan = plan_of(world, cut, compute_dtype=precision)
    whole = shard(Toy(), plan, world)
    with torch.device("meta"):
        shapes = Toy()
    values = dict(Toy().named_parameters())
    asked: list[str] = []

    def initial(name: str) -> Tensor:
        asked.append(name)
        return values[name]

    deferred = shard(shapes, plan, world, initial=initial)
    assert deferred.module.head.weight is deferred.module.embedding.weight
    assert not deferred.module.frozen.requires_grad
    assert sorted(asked) == sorted(values), "a tied parameter is asked for once"
    return tuple((train(engine, world, 2), weights(engine)) for engine in (whole, deferred))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_deferred_module_trains_as_a_whole_one_does(cut: tuple[int, int, int], precision: str) -> None:
    for whole, deferred in run_world((2, 2), _both, cut, precision):
        assert deferred == whole


def _most_while_made(world: World, blocks: int) -> int:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(blocks)))
    with Peak() as peak:
        shard(module, plan_of(world, (0, 0, 0)), world, initial=lambda _: torch.ones(WIDTH, WIDTH))
    return peak.most


def _most(world: World) -> tuple[int, int]:
    return _most_while_made(world, 4), _most_while_made(world, 24)


def test_no_rank_holds_more_than_its_share_and_a_unit_or_two() -> None:
    """Weights and gradients are a quarter of a unit each, a parameter elsewhere one NaN; whole are a unit and its values."""
    few, many = run_world(4, _most)[0]
    kept = 2 * UNIT_BYTES // 4 + 4
    assert many - few == 20 * kept
    assert few <= 4 * kept + 2 * UNIT_BYTES + 16


def _alone(module: nn.Module, **options: Any) -> Sharded:
    world = World(0, 1, 0, cluster_of((1,)), torch.device("cpu"))
    return shard(module, plan_of(world, (-1, -1, -1)), world, **options)


def test_values_that_are_missing_or_wrong_are_named() -> None:
    with torch.device("meta"):
        linear, norm = nn.Linear(3, 2), nn.BatchNorm1d(4)
    with pytest.raises(UseError, match=r"bias is on the meta device; give shard\(\) `initial`"):
        _alone(linear)
    with pytest.raises(UseError, match=r"`initial` made \(1,\) for weight, which is \(2, 3\)"):
        _alone(linear, initial=lambda _: torch.ones(1))
    with pytest.raises(UseError, match="buffer running_mean is on the meta device"):
        _alone(norm, initial=lambda _: torch.ones(4))
