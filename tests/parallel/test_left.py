"""A rank that nobody adds to takes gradients from where backward has left them."""

from typing import Any

import pytest
import torch
from torch import nn

from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from thinwire.plan.partition import Partition
from thinwire.plan.plan import Plan
from worlds import cluster_of


class _Net(nn.Module):
    """Three layers, of which the last may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second, self.last = nn.Linear(6, 7), nn.Linear(7, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, *, whole: bool = True) -> torch.Tensor:
        hidden: torch.Tensor = self.second(self.first(x).tanh())
        return self.last(hidden) if whole else hidden


def _alone(**plan: Any) -> Sharded:
    world = World.join(cluster_of([1]), rank=0, size=1, local_rank=0, host="127.0.0.1", port=0)
    whole = Partition(params="replica", grads="replica", optimizer="replica")
    return shard(_Net(), Plan(levels=(("node", 1),), partition=whole, **plan), world)


def _adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2)


def _batch(step: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


def _made_sums(engine: Sharded) -> bool:
    return any(grads._buffer is not None for unit in engine.units for grads in unit.grads.values())


def test_training_is_the_plain_loops_bit_for_bit_and_no_sums_are_made() -> None:
    """In all steps but the first the last layer is not used: it has no gradient, and is left alone."""
    engine, plain = _alone(), _Net()
    optimizer, expected = ShardedOptimizer(engine, _adamw), _adamw(plain.parameters())
    for step in range(4):
        with engine.micro_batch(last=True):
            engine.module(_batch(step), whole=step == 0).square().sum().backward()
        engine.finish_reduce()
        expected.zero_grad()
        plain(_batch(step), whole=step == 0).square().sum().backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
        assert engine.grad_norm() == pytest.approx(norm.item(), rel=1e-6)
        expected.step()
        optimizer.step()
        for mine, theirs in zip(engine.module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert not _made_sums(engine)


@pytest.mark.parametrize("lasts", [[False, False, True], [True, True]])
def test_more_micro_batches_add_up_even_after_one_that_was_called_the_last(lasts: list[bool]) -> None:
    engine, plain = _alone(), _Net()
    for step, last in enumerate(lasts):
        with engine.micro_batch(last=last):
            engine.module(_batch(step)).square().sum().backward()
        plain(_batch(step)).square().sum().backward()
    engine.finish_reduce()
    for owned, parameter in zip(engine.owned(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(owned.grad(), parameter.grad.flatten())
    assert _made_sums(engine)


def test_gradients_of_a_skipped_step_are_gone() -> None:
    engine = _alone()
    optimizer = ShardedOptimizer(engine, _adamw)
    for step in (0, 1):
        with engine.micro_batch(last=True):
            engine.module(_batch(step)).square().sum().backward()
        engine.finish_reduce()
        if step == 0:
            optimizer.skip()
    plain = _Net()
    plain(_batch(1)).square().sum().backward()
    for owned, parameter in zip(engine.owned(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(owned.grad(), parameter.grad.flatten())


def test_of_weights_in_bf16_gradients_are_taken_in_fp32() -> None:
    engine = _alone(compute_dtype="bf16")
    with engine.micro_batch(last=True):
        engine.module(_batch(0).bfloat16()).square().sum().backward()
    engine.finish_reduce()
    assert {owned.grad().dtype for owned in engine.owned()} == {torch.float32}
    assert engine.grad_norm() > 0
