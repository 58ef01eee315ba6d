"""What coded hops lose and keep: sums sent + residuals = sums put in; a step that is not taken leaves no trace."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partition_toy import Toy, adamw, batches, one_step, plan_of, weights
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from worlds import cluster_of, run_world

STEPS, CODECS = 3, ("int4", "int8", "int4-hadamard")
SKIPS: dict[str, dict[str, Any]] = {
    "delta weights": {"weights": {"cluster": "delta-int4"}},
    "both ways": {"weights": {"cluster": "delta-int8"}, "grads": {"cluster": "int4"}, "error_feedback": True},
    "low rank": {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0},
}


def _forward_backward(engine: Sharded, world: World, step: int) -> None:
    tokens, targets = next(batches(world, step, 1))
    with engine.micro_batch(last=True):
        F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum").backward()
    engine.finish_reduce()


def _over_group(world: World, x: Tensor) -> list[Tensor]:
    """Everybody's `x` in this rank's group across the cluster."""
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x.contiguous(), group=world.group(1, "small"))
    return parts


def _noted(given: dict[int, Tensor], key: int, plus: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    given[key] = part.clone()
    return plus(part)


def _conserved(world: World, codec: str) -> list[tuple[float, float, float]]:
    """Per buffer: (what is missing, what one step's coding loses, what was put in), as norms, over all steps."""
    compression = {"grads": {"cluster": codec}, "error_feedback": True}
    engine = shard(Toy(), plan_of(world, (0, 0, 1), compression=compression), world)
    optimizer = adamw(engine)
    buffers = [grads for unit in engine.units for grads in unit.grads.values()]
    given: dict[int, Tensor] = {}
    for grads in buffers:
        grads.residual.plus = partial(_noted, given, id(grads), grads.residual.plus)  # type: ignore[method-assign]
    put_in = [torch.zeros(len(grads.spec.at(0)), dtype=torch.float64) for grads in buffers]
    arrived = [torch.zeros(len(grads.spec.at(0)), dtype=torch.float64) for grads in buffers]
    for step in range(STEPS):
        _forward_backward(engine, world, step)
        for grads, total, received in zip(buffers, put_in, arrived, strict=True):
            total.add_(torch.stack(_over_group(world, given[id(grads)])).double().sum(0))
            received.add_(torch.cat(_over_group(world, grads.reduced)))
        optimizer.step(grad_scale=0.01)
    found = []
    for grads, total, received in zip(buffers, put_in, arrived, strict=True):
        assert grads.residual.value is not None
        left = sum(part.double() for part in _over_group(world, grads.residual.value))
        mine = grads.spec.at(0)
        own = slice(
            0, max(0, min(len(mine), grads.spec.layout.used - mine.start))
        )  # what is beyond is padding: no sum's
        missing, lost = (received + left - total)[own], (received - total)[own]
        found.append((float(missing.norm()), float(lost.norm()), float(total[own].norm())))
    engine.drain()
    return found


def _skipped(world: World, compression: dict[str, Any]) -> dict[str, Any]:
    """The same steps with one that is skipped in between and without."""
    with_skip = shard(Toy(), plan_of(world, (0, 0, 1), compression=compression), world)
    without = shard(Toy(), plan_of(world, (0, 0, 1), compression=compression), world)
    skipping, plain = adamw(with_skip), adamw(without)
    for step in range(2):
        one_step(with_skip, skipping, world, step)
        one_step(without, plain, world, step)
    flats = [flat for unit in with_skip.units for flat in unit.flats]
    held = [flat.weights.clone() for flat in flats]
    _forward_backward(with_skip, world, 7)
    skipping.skip()
    with_skip.drain()
    kept = all(torch.equal(flat.weights, before) for flat, before in zip(flats, held, strict=True))
    on = [(one_step(with_skip, skipping, world, step), one_step(without, plain, world, step)) for step in (2, 3)]
    return {"kept": kept, "on": on, "weights": weights(with_skip) == weights(without)}


def _all(world: World) -> dict[str, Any]:
    conserved = {codec: _conserved(world, codec) for codec in CODECS}
    return conserved | {name: _skipped(world, compression) for name, compression in SKIPS.items()}


@cache
def results() -> list[dict[str, Any]]:
    return run_world((2, 2), _all)


@pytest.mark.parametrize(
    "codec", [codec if codec == "int4" else pytest.param(codec, marks=pytest.mark.slow) for codec in CODECS]
)
def test_sums_sent_and_residuals_are_the_sums_put_in_at_the_engines_own_hop(codec: str) -> None:
    buffers = [found for result in results() for found in result[codec]]
    assert any(lost > 1e-4 * put_in > 0 for _, lost, put_in in buffers), "the codec lost nothing"
    for missing, _, put_in in buffers:
        assert missing <= 1e-6 * put_in


@pytest.mark.parametrize("name", SKIPS)
def test_a_skipped_step_leaves_references_residuals_and_warm_starts_as_they_were(name: str) -> None:
    for result in results():
        assert result[name]["kept"]
        assert result[name]["weights"]
        for with_skip, without in result[name]["on"]:
            assert with_skip == without


def test_feedback_is_at_the_outermost_level_that_joins_more_than_one() -> None:
    world = World(0, 2, 0, cluster_of((2, 1)), torch.device("cpu"))
    compression = {"grads": {"node": "int4", "cluster": "int4"}, "error_feedback": True}
    engine = shard(Toy(), plan_of(world, (-1, -1, 1), compression=compression), world)
    assert {grads.feedback_level for unit in engine.units for grads in unit.grads.values()} == {0}
