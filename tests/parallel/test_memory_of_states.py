"""States take the memory of the formula, and at most two units are whole at once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partition_toy import adamw, plan_of
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world


def _states(world: World, cut: tuple[int, int, int], dtype: str) -> tuple[float, float]:
    """(bytes of all states that this rank holds between steps, the formula's)."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    elements = sum(parameter.numel() for parameter in module.parameters())
    engine = shard(module, plan_of(world, cut, compute_dtype=dtype), world)
    optimizer = adamw(engine)
    with engine.micro_batch(last=True):
        module(torch.ones(2, 64).to(next(iter(engine.units[0].flats)).kind.compute)).float().sum().backward()
    engine.finish_reduce()
    optimizer.step()
    engine.drain()
    tensors = [
        t
        for unit in engine.units
        for flat in unit.flats
        for t in (flat.weights, unit.grads[flat].buffer if flat.trained else None, flat.master, flat.unsharded)
        if t is not None
    ]
    assert optimizer._optimizer is not None
    tensors += [t for state in optimizer._optimizer.state.values() for t in state.values()]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes()
    }
    sizes = [1, *(world.cluster.ranks_within(level) for level in range(len(world.cluster.levels)))]
    p, g, o = (sizes[depth + 1] for depth in cut)
    width = 2 if dtype == "bf16" else 4
    inside = 4 / o if width == 4 else 0  # the masters lie in the weights then
    return sum(held.values()), elements * (width / p - inside + 4 / g + 12 / o)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", [(-1, -1, -1), (-1, -1, 1), (0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_states_take_the_formulas_memory(cut: tuple[int, int, int], dtype: str) -> None:
    for held, formula in run_world((2, 2), _states, cut, dtype):
        assert held == pytest.approx(formula, rel=0.05)


def _memory(world: World, blocks: int) -> tuple[int, int]:
    """(most bytes of whole weights at once in forward and backward, bytes of one block's)."""
    torch.manual_seed(0)
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(blocks))  # type: ignore[assignment]

    def forward(x: Tensor) -> Tensor:
        for block in module.blocks:  # type: ignore[union-attr]
            x = block(x)
        return x

    module.forward = forward  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, (0, 0, 0)), world)
    seen = [0]

    def watch(*_: Any) -> None:
        here = [unit for unit in engine.units if unit.gathered or unit.gathering is not None]
        seen.append(sum(4 * flat.layout.numel for unit in here for flat in unit.flats))

    for unit in engine.units:
        unit.entries[0].register_forward_hook(watch)
        unit.entries[0].register_full_backward_hook(watch)
    for step in range(2):
        with engine.micro_batch(last=step == 1):
            module(torch.ones(2, 64, requires_grad=True)).sum().backward()
    engine.finish_reduce()
    engine.dropped()
    return max(seen), 4 * engine.units[0].flats[0].layout.numel


@pytest.mark.parametrize("blocks", [3, 9])
def test_at_most_two_units_are_whole_at_once_at_any_depth(blocks: int) -> None:
    for most, one in run_world(2, _memory, blocks):
        assert most == 2 * one
