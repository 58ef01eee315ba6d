"""Kinds that apply what is a round old: CO2 (the invariant I16) and eager updates (I18)."""

from itertools import pairwise
from typing import Any

import torch

from sync_toy import SITES, WIDTH, Group, sgd
from thinwire.comm.world import World
from worlds import run_world


def _one_round_late(world: World) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
    """CO2: the outer weights after every round, this group's changes, whether it starts a round from the outer weights."""
    group = Group(world, {"kind": "co2", "inner_steps": 2, "outer_momentum": 0.5, "gap_penalty": False, "clip": 0.01})
    changes, (fragment,) = group.changes(), group.sync.fragments
    seen, together = [fragment.weights.clone()], True
    for _ in range(4):
        group.train(2)
        seen.append(fragment.weights.clone())
        together = together and torch.equal(group.local(), group.outer())
    group.sync.settle()
    return [*seen, fragment.weights.clone()], changes, together


def test_i16_co2_applies_the_last_rounds_change_with_clipped_momentum() -> None:
    (a_seen, a, together), (b_seen, b, _) = run_world(SITES, _one_round_late)
    assert together
    expected, momentum = a_seen[0], torch.zeros_like(a[0])
    assert torch.equal(a_seen[1], expected)  # in the first round there is nothing to apply
    for number in range(4):
        momentum = (0.5 * momentum + (a[number] + b[number]) / 2).clamp(-0.01, 0.01)
        expected = expected - momentum
        assert torch.allclose(a_seen[number + 2], expected, rtol=1e-5, atol=1e-6), number
        assert torch.equal(a_seen[number + 2], b_seen[number + 2])
    assert momentum.abs().max() == 0.01
    assert momentum.abs().min() < 0.009


def _eager(world: World, sync: dict[str, Any]) -> torch.Tensor:
    group = Group(world, sync)
    group.train(9)
    group.sync.settle()
    return group.local()


def test_i18_eager_with_one_group_is_diloco() -> None:
    eager = run_world([("site", 1)], _eager, {"kind": "eager", "inner_steps": 3})[0]
    diloco = run_world([("site", 1)], _eager, {"kind": "diloco", "inner_steps": 3})[0]
    assert torch.allclose(eager, diloco, rtol=1e-5, atol=1e-7)


class Slope(torch.nn.Module):
    """The square of its output grows evenly with every weight, so that all rounds change the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ torch.arange(1.0, WIDTH + 1) + 1000).sqrt()


def _equal_rounds(world: World, kind: str) -> list[torch.Tensor]:
    sync = {"kind": kind, "inner_steps": 3, "outer_lr": 0.5, "outer_momentum": 0.0}
    group = Group(world, sync, module=Slope(), build=sgd(0.01))
    seen = []
    for _ in range(4):
        group.train(3)
        seen.append(group.sync.fragments[0].weights.clone())
    group.sync.settle()
    return [after - before for before, after in pairwise(seen)]


def test_i18_eager_in_equal_rounds_of_identical_data_is_synchronous() -> None:
    """From its second round on: in the first there is nothing of the others yet."""
    for eager, diloco in zip(
        run_world(SITES, _equal_rounds, "eager"), run_world(SITES, _equal_rounds, "diloco"), strict=True
    ):
        for moved, expected in zip(eager, diloco, strict=True):
            assert torch.allclose(moved, expected, rtol=1e-3)
            assert expected.abs().min() > 1e-3


def _late(world: World, tokens: list[float]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outer weights and changes of three rounds; in round r group 1 trains on `tokens[r]` tokens a step."""
    group = Group(world, {"kind": "eager", "inner_steps": 2, "outer_lr": 0.5, "outer_momentum": 0.0})
    changes, (fragment,) = group.changes(), group.sync.fragments
    seen = []
    for count in tokens:
        group.train(2, tokens=count if world.rank == 1 else 1.0)
        seen.append(fragment.weights.clone())
    group.sync.settle()
    return seen, changes


def test_i18_eager_takes_its_own_newest_change_and_the_others_last() -> None:
    (a_seen, a), (b_seen, b) = run_world(SITES, _late, [1.0, 1.0, 1.0])
    for seen, own, other in ((a_seen, a, b), (b_seen, b, a)):
        for number in range(1, 3):
            change = (own[number - 1] + other[number - 1]) / 2 + (own[number] - own[number - 1]) / 2
            assert torch.allclose(seen[number], seen[number - 1] - 0.5 * change, rtol=1e-5, atol=1e-6)


def test_i18_an_eager_update_is_the_mean_over_the_groups_that_count() -> None:
    """Group 1 is left out of rounds 0 and 1, and back in round 2."""
    (a_seen, a), (b_seen, b) = run_world(SITES, _late, [0.0, 0.0, 1.0])
    taken = {
        0: [a[0] / 2, a[1], a[2]],  # before the first answer the others count as unmoved
        1: [torch.zeros_like(b[0]), a[0], (a[1] + b[2]) / 2],
    }
    for group, seen in enumerate((a_seen, b_seen)):
        for number in range(1, 3):
            moved = seen[number - 1] - seen[number]
            assert torch.allclose(moved, 0.5 * taken[group][number], rtol=1e-4, atol=1e-6), (group, number)
