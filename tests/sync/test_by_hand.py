"""Rounds of real groups against training in one process and by hand: the invariants I1 to I5."""

import pytest
import torch

from sync_toy import SITES, Group, Stack, alike, draw, sgd
from thinwire.comm.world import World
from worlds import run_world


def _alone(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plain = Group(world, {"outer_lr": 1.0, "outer_momentum": 0.0, "inner_steps": 100})
    looking = Group(world, {"outer_lr": 1.0, "outer_momentum": 0.0, "inner_steps": 3})
    ahead = Group(world, {"inner_steps": 3, "outer_lr": 0.4, "outer_momentum": 0.9})
    for group in (plain, looking, ahead):
        group.train(9)
    return plain.local(), looking.local(), ahead.local()


def test_i1_one_group_with_lr_1_and_no_momentum_is_plain_training() -> None:
    plain, looking, ahead = run_world([("site", 1)], _alone)[0]
    assert torch.allclose(plain, looking, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(plain, ahead, rtol=1e-3)  # Lookahead is something else


def _every_step(world: World, outer: tuple[float, float], inner_lr: float) -> tuple[torch.Tensor, list[float]]:
    lr, momentum = outer
    group = Group(
        world, {"inner_steps": 1, "outer_lr": lr, "outer_momentum": momentum, "fragments": 1}, build=sgd(inner_lr)
    )
    losses = group.train(6)
    return group.local(), losses


def _data_parallel(world_size: int, lr: float, momentum: float) -> torch.Tensor:
    module = Stack()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(6):
        optimizer.zero_grad()
        for rank in range(world_size):
            (module(draw(step, rank)).square().mean() / world_size).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.7, 0.9)])
@pytest.mark.parametrize("groups", [2, 3])
def test_i2_i3_a_round_each_step_of_sgd_is_data_parallel_nesterov(groups: int, lr: float, momentum: float) -> None:
    expected = _data_parallel(groups, lr * 0.1, momentum)
    for weights, _ in run_world([("site", groups)], _every_step, (lr, momentum), 0.1):
        assert torch.allclose(weights, expected, rtol=1e-4, atol=1e-6)


def _identical(world: World) -> list[torch.Tensor]:
    group = Group(world, {"inner_steps": 4})
    group.train(4, batch=alike)
    return [group.local()]


def test_i2_groups_that_see_the_same_data_change_alike() -> None:
    two, one = run_world(SITES, _identical), run_world([("site", 1)], _identical)
    assert torch.equal(two[0][0], two[1][0])
    moved, alone = two[0][0], one[0][0]
    assert torch.allclose(moved - _start(), (alone - _start()) * 0.6 / 0.4, rtol=1e-3, atol=1e-6)


def _start() -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in Stack().parameters()])


class Apart(torch.nn.Module):
    """Blocks that do not see each other: a separable problem."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(12, 4, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block(x) for block in self.blocks])


def _separable(world: World) -> list[torch.Tensor]:
    """Each block's outer weights after every step, a fragment of its own for each."""
    group = Group(world, {"inner_steps": 4, "fragments": 4}, module=Apart(), build=sgd(0.05))
    seen: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for _ in range(16):
        group.train(1, batch=alike_of_round)
        for fragment in group.sync.fragments:
            (share,) = fragment.shares
            seen[share.unit].append(fragment.weights.clone())
    return [torch.stack(history) for history in seen]


def alike_of_round(step: int, rank: int) -> torch.Tensor:
    """Data that depends on the rank alone."""
    return draw(0, rank)


def _whole_model(block: int) -> torch.Tensor:
    """DiLoCo by hand with the whole model as one fragment, sent when this block is: its outer weights after every step."""
    locals_ = [Apart(), Apart()]
    outer = Apart()
    parameters = list(outer.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    seen = []
    for step in range(1, 17):
        for rank, module in enumerate(locals_):
            module.zero_grad()
            module(alike_of_round(step, rank)).square().mean().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p.sub_(p.grad, alpha=0.05)
        if step % 4 == (block + 1) % 4:
            with torch.no_grad():
                for theta, v, a, b in zip(parameters, velocity, *(m.parameters() for m in locals_), strict=True):
                    change = theta - (a + b) / 2
                    v.mul_(0.9).add_(change)
                    theta.sub_(change + 0.9 * v, alpha=0.6)
                    a.copy_(theta)
                    b.copy_(theta)
        seen.append(parameters[block].detach().flatten().clone())
    return torch.stack(seen)


def test_i4_fragments_that_do_not_interact_move_as_the_whole_model_would() -> None:
    for block, history in enumerate(run_world(SITES, _separable)[0]):
        expected = _whole_model(block)
        assert torch.allclose(history, expected, rtol=1e-4, atol=1e-6), block
        assert (history[-1] - history[0]).abs().max() > 1e-3


def _mixed(world: World, mix: float) -> tuple[torch.Tensor, torch.Tensor]:
    group = Group(world, {"inner_steps": 3, "mix": mix})
    group.train(3)
    return group.local(), group.outer()


def test_i5_mix_1_leaves_groups_alone_and_mix_0_takes_the_outer_weights() -> None:
    none = run_world([("site", 1)], _mixed, 1.0)[0][0]
    ones, zeros, halves = (run_world(SITES, _mixed, mix) for mix in (1.0, 0.0, 0.5))
    assert torch.equal(ones[0][0], none)
    assert not torch.equal(ones[0][0], ones[1][0])
    for (local, outer), (half, _), (own, _) in zip(zeros, halves, ones, strict=True):
        assert torch.equal(local, outer)
        assert torch.allclose(half, (own + outer) / 2, atol=1e-6)
