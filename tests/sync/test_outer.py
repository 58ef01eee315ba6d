"""The outer step and the aggregates by themselves: torch's SGD, SlowMo, gap and clip, weights and medians."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.plan.sync import Sync, SyncConfig
from thinwire.sync.message import aggregate
from thinwire.sync.outer_step import mix_into, outer_step, staleness_gap


def sync(**given: object) -> Sync:
    return SyncConfig.model_validate(given).resolve([("site", 2)])


def changes(count: int, n: int = 50) -> list[torch.Tensor]:
    return list(torch.randn(count, n, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["diloco", "co2"])
def test_i3_the_outer_step_is_torchs_sgd_bit_for_bit(kind: str, momentum: float) -> None:
    point = sync(kind=kind, outer_lr=0.7, outer_momentum=momentum, gap_penalty=False).model_copy(update={"clip": None})
    weights, velocity = torch.ones(50), torch.zeros(50)
    reference = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.SGD([reference], lr=0.7, momentum=momentum, nesterov=point.nesterov and momentum > 0)
    for change in changes(4):
        reference.grad = change.clone()
        optimizer.step()
        outer_step(weights, velocity, change.clone(), point)
        assert torch.equal(weights, reference.detach())


def test_i16_co2_without_delay_gap_and_clip_is_slowmo_and_without_momentum_the_average() -> None:
    slowmo = sync(kind="co2", outer_lr=0.8, outer_momentum=0.5, gap_penalty=False).model_copy(update={"clip": None})
    weights, velocity, by_hand, u = torch.ones(50), torch.zeros(50), torch.ones(50), torch.zeros(50)
    for change in changes(3):
        outer_step(weights, velocity, change.clone(), slowmo)
        u = 0.5 * u + change
        by_hand = by_hand - 0.8 * u
        assert torch.allclose(weights, by_hand, rtol=1e-5, atol=1e-6)
    average = sync(kind="local_sgd")
    a, b, start = changes(3)
    outer = start.clone()
    outer_step(outer, torch.zeros(50), aggregate(torch.stack([start - a, start - b]), [1, 1], "mean"), average)
    assert torch.allclose(outer, (a + b) / 2, atol=1e-6)


def test_i16_clipping_clips() -> None:
    point = sync(kind="co2", outer_momentum=0.9, clip=0.25)
    weights, velocity = torch.zeros(50), torch.zeros(50)
    before = weights.clone()
    outer_step(weights, velocity, changes(1)[0] * 100, point, rms=0.0)
    assert velocity.abs().max() == 0.25
    assert (weights - before).abs().max() <= 0.25 * point.outer_lr


def test_the_gap_is_one_where_nothing_moved_two_where_all_moved_alike_and_grows_with_the_move() -> None:
    assert torch.equal(staleness_gap(torch.zeros(3), 0.0), torch.ones(3))
    assert torch.equal(staleness_gap(torch.full((3,), -0.5), 0.5), torch.full((3,), 2.0))
    far = staleness_gap(torch.tensor([0.0, 1.0, -9.0]), 1.0)
    assert far.tolist() == [1.0, 2.0, 10.0]


def test_i5_mixing_is_linear_and_its_ends_are_exact() -> None:
    local, outer = changes(2)
    ends = {alpha: local.clone() for alpha in (0.0, 0.25, 0.5, 1.0)}
    for alpha, mixed in ends.items():
        mix_into(mixed, outer, alpha)
        assert torch.allclose(mixed, alpha * local + (1 - alpha) * outer, atol=1e-6)
    assert torch.equal(ends[0.0], outer)
    assert torch.equal(ends[1.0], local)


@given(st.integers(1, 8), st.data())
def test_i11_equal_contributions_come_out_as_they_went_in(groups: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=groups, max_size=groups))
    change = changes(1)[0]
    for how in ("mean", "tokens", "median", "trimmed"):
        out = aggregate(change.expand(groups, -1), weights, how)  # type: ignore[arg-type]
        expected = change if any(weights) else torch.zeros(50)
        assert torch.allclose(out, expected, rtol=1e-6), how


def test_tokens_weigh_and_a_group_left_out_does_not_count() -> None:
    a, b, c = changes(3)
    parts = torch.stack([a, b, c])
    assert torch.allclose(aggregate(parts, [1, 3, 0], "tokens"), (a + 3 * b) / 4, atol=1e-6)
    assert torch.allclose(aggregate(parts, [1, 3, 0], "mean"), (a + b) / 2, atol=1e-6)


def test_median_and_trimmed_mean_ignore_a_wild_group() -> None:
    a, b, c = changes(3)
    wild = torch.full((50,), 1e9)
    parts = torch.stack([a, wild, b, c])
    middle = torch.stack([a, b, c]).median(dim=0).values
    for how in ("median", "trimmed"):
        out = aggregate(parts, [1, 1, 1, 1], how)  # type: ignore[arg-type]
        assert out.abs().max() < 10
    assert torch.equal(aggregate(torch.stack([a, b, c]), [1, 1, 1], "median"), middle)
    assert math.isclose(aggregate(parts, [1, 1, 1, 1], "mean").abs().max().item(), 2.5e8, rel_tol=1e-3)


def _furthest_after(rounds: int, point: Sync) -> float:
    """Groups whose every round goes all the way to 0 from where it begins, the change applied one round late."""
    weights, before, momentum = torch.ones(4), torch.ones(4), torch.zeros(4)
    far = []
    for _ in range(rounds):
        change, before = before.clone(), weights.clone()
        outer_step(weights, momentum, change, point, rms=float(momentum.square().mean().sqrt()))
        far.append(float(weights.abs().max()))
    return max(far[-10:])


def test_co2s_own_momentum_settles_where_rounds_go_all_the_way() -> None:
    """Gap 2 everywhere: momentum + 1/2 must stay below 1."""
    assert _furthest_after(60, sync(kind="co2")) < 1e-3
    assert _furthest_after(60, sync(kind="co2", outer_momentum=0.5)) > 0.5
