"""A cut module in a user's own hands: what can be done with it gives the right numbers, what cannot is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partition_toy import Toy, adamw, batches, one_step, plan_of, train, weights
from thinwire.comm.world import World
from thinwire.errors import UseError
from thinwire.parallel.shard.engine import Sharded, shard
from worlds import run_world

CUTS = [(-1, -1, -1), (-1, -1, 1), (0, 0, 1), (1, 1, 1)]


def _state_dicts(world: World) -> None:
    """state_dict is whole and new in the middle of everything, under any cut; what is loaded is what is trained on."""
    states, after = [], []
    for cut in CUTS:
        engine = shard(Toy(), plan_of(world, cut), world)
        optimizer = adamw(engine)
        one_step(engine, optimizer, world, 0)
        with engine.micro_batch(last=True):
            loss(engine, world, 1).backward()
        engine.finish_reduce()
        optimizer.step(grad_scale=0.01)  # nobody has waited for the new weights
        states.append({name: value.clone() for name, value in engine.module.state_dict().items()})
        engine.module.load_state_dict({name: value + 1 for name, value in states[-1].items()})
        assert all(torch.equal(value, states[-1][name] + 1) for name, value in engine.module.state_dict().items())
        after.append(one_step(engine, adamw(engine), world, 2))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    assert all(result == after[0] for result in after)


def loss(engine: Sharded, world: World, step: int) -> Tensor:
    tokens, targets = next(batches(world, step, 1))
    return F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum")


def test_state_dict_and_its_loading_see_whole_new_weights_under_every_cut() -> None:
    run_world((2, 2), _state_dicts)


def _edits_inside(world: World) -> None:
    digests = []
    for cut in CUTS:
        engine = shard(Toy(), plan_of(world, cut), world)
        train(engine, world, 1, steps=1)
        with engine.full_parameters(), torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.mul_(0.5)
        train(engine, world, 1, steps=1)
        digests.append(weights(engine))
    assert len(set(digests)) == 1


def test_edits_of_whole_parameters_are_kept_under_every_cut() -> None:
    run_world((2, 2), _edits_inside)


def refused(act: Callable[[], Any], says: str) -> None:
    with pytest.raises(UseError, match=says):
        act()


def _micro_batch(engine: Sharded, world: World, act: Callable[[Tensor], Any]) -> None:
    with engine.micro_batch(last=True):
        act(loss(engine, world, 0))


def _misuses(world: World) -> None:
    def fresh(cut: tuple[int, int, int] = (0, 0, 1)) -> Sharded:
        return shard(Toy(), plan_of(world, cut), world)

    engine = fresh()
    refused(lambda: loss(engine, world, 0).backward(), "outside engine.micro_batch")
    engine = fresh((-1, -1, 1))
    refused(lambda: loss(engine, world, 0).backward(), "outside engine.micro_batch")
    engine = fresh((-1, -1, 1))
    engine.module.double()
    refused(lambda: _micro_batch(engine, world, Tensor.backward), "moved, converted")
    refused(fresh().module.double, "moved, converted")
    engine = fresh()
    engine.module.scale.requires_grad_(False)
    refused(lambda: _micro_batch(engine, world, Tensor.backward), "scale was moved, converted, replaced, frozen")
    engine = fresh()
    refused(lambda: adamw(engine).step(), "there are no gradients: run forward and backward")
    for cut in CUTS:
        engine = fresh(cut)
        _micro_batch(engine, world, Tensor.backward)
        engine.finish_reduce()
        refused(lambda: nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0), "their norm is engine.grad_norm()")  # noqa: B023
        engine.dropped()


def test_uses_that_would_give_wrong_numbers_are_refused_by_name() -> None:
    run_world((2, 2), _misuses)


class Transformed(nn.Module):
    """A unit that differentiates by its input in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(lambda y: self.linear(y).square().sum())(x)
        return self.linear(x) + 0.1 * slope


def _transforms(world: World) -> None:
    def run(cut: tuple[int, int, int], **more: Any) -> tuple[float, bytes]:
        torch.manual_seed(0)
        engine = shard(nn.Sequential(Transformed(), Transformed()), plan_of(world, cut, **more), world)
        optimizer = adamw(engine)
        for _ in range(2):
            with engine.micro_batch(last=True):
                total = engine.module(torch.ones(2, 4)).square().mean()
                total.backward()
            engine.finish_reduce()
            optimizer.step(grad_scale=0.5)
        engine.drain()
        return total.item(), weights(engine)

    assert run((-1, -1, -1)) == run((-1, -1, 0)) == run((0, 0, 0), keep_gathered=True)
    refused(lambda: run((0, 0, 0)), "calls torch.func.grad or another transform in its forward: leave it out")


def test_a_transform_in_a_forward_is_right_or_told_what_it_needs() -> None:
    run_world(2, _transforms)


def _before(world: World) -> None:
    module = Toy()
    module.scale.grad = torch.ones(1)
    refused(lambda: shard(module, plan_of(world, (0, 0, 0)), world), "scale has a gradient from before shard")
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    refused(lambda: shard(lazy, plan_of(world, (0, 0, 0)), world), "has no shape yet; run one forward before shard")


def test_what_cannot_be_cut_is_refused_by_name_before_anything_is() -> None:
    run_world(2, _before)


@dataclass
class Output:
    hidden: Tensor
    more: list[Any]


class InDataclass(nn.Module):
    """A block whose output is an object, not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Output:
        return Output(self.linear(x), ["nothing", None, 3])


def _objects(world: World) -> tuple[Tensor, Tensor]:
    """(gradients of a cut module whose blocks give objects, of the plain module)."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(InDataclass() for _ in range(3))

    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x).hidden.tanh()
        return x.sum()

    plain = torch.autograd.grad(run(torch.ones(2, 4)), list(blocks.parameters()))
    module = nn.Module()
    module.blocks = blocks
    module.forward = run  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, (0, 0, 0)), world)
    with engine.micro_batch(last=True):
        module(torch.ones(2, 4)).backward()
    engine.finish_reduce()
    got = torch.cat([part.grad() for part in engine.owned()])
    whole = torch.cat([grad.flatten() for grad in plain])
    engine.dropped()
    engine.drain()
    return got, whole


def test_blocks_may_give_objects_that_hold_tensors() -> None:
    results = run_world(2, _objects)
    mine = [got for got, _ in results]
    got = torch.cat([part for unit in range(3) for part in (mine[0].view(3, -1)[unit], mine[1].view(3, -1)[unit])])
    assert torch.allclose(got, 2 * results[0][1], rtol=1e-6)


STOCHASTIC: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "all-reduce over two levels": ((-1, -1, -1), {"grads": {"node": "int8", "cluster": "int4"}}),
    "weights inside a replicated node": ((0, 0, 0), {"weights": {"node": "int8"}, "grads": {"cluster": "int4"}}),
    "weights of both hops": ((-1, -1, 1), {"weights": {"node": "int8", "cluster": "int4"}}),
}


def _replicas(world: World, cut: tuple[int, int, int], compression: dict[str, Any]) -> list[bytes]:
    engine = shard(
        Toy(), plan_of(world, cut, compression={**compression, "rounding": "stochastic", "block": 64}), world
    )
    optimizer = adamw(engine)
    return [one_step(engine, optimizer, world, step)[2] for step in range(3)]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_replicas_hold_the_same_bits_after_each_step_also_when_chance_rounds(name: str) -> None:
    results = run_world((2, 2), _replicas, *STOCHASTIC[name])
    assert all(result == results[0] for result in results)
    assert len(set(results[0])) == 3
