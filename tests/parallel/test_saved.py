"""What one cut saved any other goes on with, what error feedback carries over included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from logical import fill, put_together
from partition_toy import Toy, adamw, one_step, plan_of
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world


def _cross_load(world: World) -> None:
    """State saved under one cut, loaded under another (also one that has trained), gives the identical next step."""
    cuts = [(-1, -1, -1), (-1, -1, 1), (-1, 1, 1), (0, 0, 0), (0, 0, 1), (1, 1, 1)]
    fresh = {cut: shard(Toy(), plan_of(world, cut), world) for cut in cuts}
    loading = {cut: (engine, adamw(engine)) for cut, engine in fresh.items()}
    for cut in cuts:
        engine = shard(Toy(), plan_of(world, cut), world)
        optimizer = adamw(engine)
        one_step(engine, optimizer, world, 0)
        saved = put_together(world, [*engine.for_save(), *optimizer.for_save()])
        reference = one_step(engine, optimizer, world, 1)
        for other, (engine, optimizer) in loading.items():
            fill([*engine.for_load(), *optimizer.for_load(saved)], saved)
            engine.loaded()
            optimizer.loaded(1)
            assert one_step(engine, optimizer, world, 1) == reference, (cut, other)


def test_what_one_cut_saved_any_other_goes_on_with_identically() -> None:
    run_world((2, 2), _cross_load)


LOSSY = {
    "int4": {"grads": {"cluster": "int4"}, "error_feedback": True},
    "int4, stochastic": {"grads": {"cluster": "int4"}, "error_feedback": True, "rounding": "stochastic"},
    "bf16": {"grads": {"cluster": "bf16"}, "error_feedback": True},
    "lowrank": {"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0},
}


def _carries(world: World, compression: dict[str, Any]) -> None:
    """Saved after two steps and resumed under each cut, what error feedback carries goes on as if never stopped."""
    cuts = [(0, 0, 1), (-1, 0, 1), (-1, -1, 1)]
    engine = shard(Toy(), plan_of(world, cuts[0], compression=compression), world)
    optimizer = adamw(engine)
    for step in range(2):
        one_step(engine, optimizer, world, step)
    carried = put_together(world, engine.carried_for_save())
    saved = carried | put_together(world, [*engine.for_save(), *optimizer.for_save()])
    on = [one_step(engine, optimizer, world, step) for step in (2, 3)]
    assert any(name.startswith("carried/residual/1/") for name in carried)
    assert all(value.abs().max() > 0 for name, value in carried.items() if name.endswith("0.0.weight"))
    for cut in cuts:
        engine = shard(Toy(), plan_of(world, cut, compression=compression), world)
        optimizer = adamw(engine)
        again = engine.carried_for_load(saved)
        fill([*engine.for_load(), *optimizer.for_load(saved), *again], saved)
        engine.loaded()
        optimizer.loaded(2)
        assert [one_step(engine, optimizer, world, step) for step in (2, 3)] == on, cut


@pytest.mark.parametrize("compression", LOSSY.values(), ids=LOSSY)
def test_what_error_feedback_carries_is_saved_and_goes_on_bit_for_bit(compression: dict[str, Any]) -> None:
    run_world((2, 2), _carries, compression)


def _regrouped(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the residuals of four members as they were put in, as two members carry them on), summed over all members."""
    compression = {"grads": {"cluster": "int4"}, "error_feedback": True}
    names = [name for name, parameter in Toy().named_parameters() if parameter.requires_grad]
    shapes = {name: parameter.numel() for name, parameter in Toy().named_parameters()}
    saved = {
        f"carried/residual/{member}/{name}": torch.arange(shapes[name]) * 10.0**member
        for member in range(4)
        for name in names
    }
    engine = shard(Toy(), plan_of(world, (0, 0, 1), compression=compression), world)
    fill(engine.carried_for_load(saved), saved)
    engine.loaded()
    now = put_together(world, engine.carried_for_save())
    return _over_members(saved), _over_members(now)


def _over_members(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parameter = name.split("/", 3)[3]
        total[parameter] = total.get(parameter, torch.zeros_like(value)) + value
    return total


def test_fewer_members_carry_on_all_that_was_not_sent() -> None:
    for before, after in run_world((2, 2), _regrouped):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
