"""Optimizers other than AdamW: what they keep is saved whole and goes on under another cut, or is refused in a sentence."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logical import fill, put_together
from partition_toy import Toy, adamw, one_step, plan_of
from thinwire.checkpoint.store import Checkpoints
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.parallel.shard.layout import Piece
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from worlds import cluster_of, run_world

BUILDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, dampening=0.1),
    "plain sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01, t0=2, lambd=0.1),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
}


def _made(world: World, cut: tuple[int, int, int], name: str) -> tuple[Sharded, ShardedOptimizer]:
    engine = shard(Toy(), plan_of(world, cut), world)
    return engine, ShardedOptimizer(engine, BUILDS[name])


def _under(name: str, pieces: list[Piece]) -> list[Piece]:
    return [replace(piece, name=f"{name}/{piece.name}") for piece in pieces]


def _goes_on(world: World, folder: Path) -> list[str]:
    """Saved after two steps under one cut; a step from there under others is the one that would have come."""
    pieces: list[Piece] = []
    on = {}
    for name in BUILDS:
        engine, optimizer = _made(world, (0, 0, 1), name)
        for step in range(2):
            one_step(engine, optimizer, world, step)
        saved = [*engine.for_save(), *optimizer.for_save()]
        pieces += _under(name, [replace(piece, tensor=piece.tensor.clone()) for piece in saved])
        on[name] = one_step(engine, optimizer, world, 2)
    store = Checkpoints(folder, keep_last=1, keep_every=0, world=world)
    store.save(2, pieces, {}).result()
    found = store.newest()
    assert found is not None
    for cut in ((1, 1, 1), (-1, -1, -1)):
        made = {name: _made(world, cut, name) for name in BUILDS}
        names = list(found.manifest.tensors)
        there = {name: {t.removeprefix(f"{name}/") for t in names if t.startswith(f"{name}/")} for name in made}
        wanted = {name: [*e.for_load(), *o.for_load(there[name])] for name, (e, o) in made.items()}
        store.load(found, [piece for name, of_name in wanted.items() for piece in _under(name, of_name)])
        for name, (engine, optimizer) in made.items():
            engine.loaded()
            optimizer.loaded(2)
            assert one_step(engine, optimizer, world, 2) == on[name], (name, cut)
    return list(found.manifest.tensors)


def test_what_an_optimizer_keeps_goes_on_under_another_cut_bit_for_bit(tmp_path: Path) -> None:
    saved = set(run_world((2, 2), _goes_on, tmp_path)[0])
    trained = [name for name, p in Toy().named_parameters() if p.requires_grad and name != "unused"]
    assert {f"nadam/optimizer.mu_product/{name}" for name in trained} <= saved
    assert {f"momentum/optimizer.momentum_buffer/{name}" for name in trained} <= saved
    assert not any("/optimizer.step/" in name and not name.endswith("/unused") for name in saved)


class Odd(torch.optim.SGD):
    """Keeps something that is neither of an element nor a single tensor."""

    def __init__(self, groups: Any, kept: Any) -> None:
        super().__init__(groups, lr=0.1)
        self._kept = kept

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"odd": self._kept}
        return super().step(closure)


@pytest.mark.parametrize(
    ("kept", "says"), [(torch.zeros(3, 2), r"'odd' of scale has shape \(3, 2\)"), (0.5, "'odd' of scale is a float")]
)
def test_states_that_cannot_be_cut_are_refused_when_saved_and_loaded(kept: Tensor | float, says: str) -> None:
    world = World(0, 1, 0, cluster_of((1,)), torch.device("cpu"))
    engine = shard(Toy(), plan_of(world, (-1, -1, -1)), world)
    optimizer = ShardedOptimizer(engine, lambda groups: Odd(groups, kept))
    with pytest.raises(PlanError, match=says):
        optimizer.for_load()
    one_step(engine, optimizer, world, 0)
    with pytest.raises(PlanError, match=says):
        optimizer.for_save()


class Sometimes(Toy):
    """Its second block is used from the second step on: its states begin then, one step behind the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, tokens: Any) -> Any:
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            if number != 1 or self.steps > 0:
                x = x + block(x)
        self.steps += 1
        return self.head(self.norm(x)) * self.scale * self.frozen.sum()


def _late(world: World) -> None:
    """Saved after one and after two steps: parameters that have yet to be used, or were used in fewer steps, go on."""
    for steps in (1, 2):
        engine = shard(Sometimes(), plan_of(world, (0, 0, 1)), world)
        optimizer = adamw(engine)
        for step in range(steps):
            one_step(engine, optimizer, world, step)
        saved = put_together(world, [*engine.for_save(), *optimizer.for_save()])
        assert ("optimizer.exp_avg/blocks.1.0.weight" in saved) == (steps == 2)
        assert ("optimizer.step/blocks.1.0.weight" in saved) == (steps == 2)
        again = shard(Sometimes(), plan_of(world, (-1, 0, 1)), world)
        again.module.steps = steps
        other = adamw(again)
        fill([*again.for_load(), *other.for_load(saved)], saved)
        again.loaded()
        other.loaded(steps)
        for step in range(steps, 4):
            assert one_step(again, other, world, step) == one_step(engine, optimizer, world, step), (steps, step)


def test_a_parameter_that_was_used_in_fewer_steps_goes_on_as_it_would_have() -> None:
    run_world((2, 2), _late)
