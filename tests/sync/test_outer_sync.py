"""Outer synchronisation on real groups of ranks: the invariants I1-I5, I7, I10-I12, I18, I19."""

from typing import Any

import pytest
import torch

from partition_toy import Toy
from sync_toy import Group, Stack, alike, draw, sgd
from thinwire.comm.world import World
from thinwire.errors import ConfigError
from thinwire.rounds.traffic import exchange_bytes
from worlds import run_world

CODECS = ["fp32", "bf16", "int8", "int4", "int4-hadamard", "e3m0", "topk"]
SITES = [("site", 2)]


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


def _agreement(world: World, sync: dict[str, Any], cut: tuple[str, str, str]) -> tuple[list[list[int]], list[Any], int]:
    """Hashes of the outer state after every step, what was sent, what the formula says."""
    group = Group(world, sync, cut=cut)
    world.ledger.drain()
    states, expected = [], 0
    for _ in range(10):
        group.train(1)
        states.append(group.state())
    group.sync.settle()
    sent = sum(e.sent_bytes for e in world.ledger.drain().entries if e.purpose.startswith("outer-"))
    for exchange in group.sync.schedule.table(10):
        fragment = group.sync.fragments[exchange.fragment]
        expected += exchange_bytes(
            fragment.numel, groups=group.sync.sync.groups, codec=group.sync.sync.codec, block=128
        )
    return states, [sent], expected


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("levels", [[("site", 2)], [("node", 2), ("site", 2)], [("site", 3)]])
def test_i7_i8_all_groups_hold_the_same_outer_state_and_send_the_formulas_bytes(levels: Any, codec: str) -> None:
    sync = {"kind": "streaming_diloco", "inner_steps": 4, "fragments": 3, "delay": 2, "codec": codec}
    cut = ("node", "node", "node") if len(levels) == 2 else ("replica", "replica", "replica")
    results = run_world(levels, _agreement, sync, cut)
    per_group = len(results) // levels[-1][1]
    for rank, (states, sent, expected) in enumerate(results):
        assert states == results[rank % per_group][0]
        assert len({tuple(state) for state in states}) > 3
        assert sent == [expected]


def _feedback_sums(world: World, how: str) -> float:
    """Largest |sum of sent + residual - sum of changes| over the elements."""
    group = Group(world, {"inner_steps": 1, "codec": how, "error_feedback": True, "mix": 0.0})
    fragment = group.sync.fragments[0]
    given, sent = torch.zeros(fragment.numel, dtype=torch.float64), torch.zeros(fragment.numel, dtype=torch.float64)
    plain_change, plain_send = fragment.change, group.sync._send

    def change() -> torch.Tensor:
        out = plain_change()
        given.add_(out)
        return out

    def send(key: Any) -> None:
        plain_send(key)
        sent.add_(group.sync._pending[-1].own)

    fragment.change, group.sync._send = change, send  # type: ignore[method-assign]
    group.train(8)
    assert fragment.residual is not None
    assert fragment.residual.abs().max() > 0
    return float((sent + fragment.residual - given).abs().max())


@pytest.mark.parametrize("codec", ["int4", "e3m0", "topk"])
def test_i10_what_is_sent_and_the_residual_add_up_to_the_changes(codec: str) -> None:
    assert all(gap < 1e-6 for gap in run_world(SITES, _feedback_sums, codec))


def _shards(world: World, groups: list[list[int]] | None, codec: str) -> tuple[torch.Tensor, list[int]]:
    inner = 1 if groups is None else len(next(ranks for ranks in groups if world.rank in ranks))
    cut = ("replica", "node", "node") if inner > 1 else ("replica", "replica", "replica")
    sync = {"kind": "streaming_diloco", "inner_steps": 4, "fragments": 2, "delay": 1, "codec": codec}
    group = Group(world, sync, cut=cut, groups=groups)
    number = group.sync.group
    group.train(9, batch=lambda step, rank: draw(step, number))
    return group.outer(), [len(places) for places in group.sync._cliques]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_i12_the_cut_inside_the_groups_does_not_matter_and_groups_may_differ_in_size(codec: str) -> None:
    single = run_world([("site", 2)], _shards, None, codec)[0][0]
    fours = run_world([("flat", 4)], _shards, [[0, 1], [2, 3]], codec)
    mixed = run_world([("flat", 6)], _shards, [[0, 1], [2, 3, 4, 5]], codec)
    for outer, cliques in fours:
        assert torch.allclose(outer, single, rtol=1e-4, atol=1e-5 if codec == "fp32" else 2e-3)
        assert set(cliques) == {1}
    for outer, _ in mixed:
        assert torch.allclose(outer, single, rtol=1e-4, atol=1e-5 if codec == "fp32" else 2e-3)
    assert max(max(cliques) for _, cliques in mixed) > 1


def _eager(world: World, sync: dict[str, Any]) -> torch.Tensor:
    group = Group(world, sync)
    group.train(9, batch=alike_of_round if world.size > 1 else draw)
    group.sync.settle()
    return group.local()


def test_i18_eager_with_one_group_is_diloco() -> None:
    eager = run_world([("site", 1)], _eager, {"kind": "eager", "inner_steps": 3})[0]
    diloco = run_world([("site", 1)], _eager, {"kind": "diloco", "inner_steps": 3})[0]
    assert torch.allclose(eager, diloco, rtol=1e-5, atol=1e-7)


def _late(world: World) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """By hand: the eager rule on what every group changed, for three rounds."""
    group = Group(world, {"kind": "eager", "inner_steps": 2, "outer_lr": 0.5, "outer_momentum": 0.0})
    seen, changes = [], []
    fragment = group.sync.fragments[0]
    plain = group.sync._send

    def send(key: Any) -> None:
        changes.append(fragment.change().clone())
        plain(key)

    group.sync._send = send  # type: ignore[method-assign]
    for _ in range(6):
        group.train(1)
        seen.append(fragment.weights.clone())
    group.sync.settle()
    return seen[1::2], changes


def test_i18_eager_takes_its_own_newest_change_and_the_others_last() -> None:
    (a_seen, a), (b_seen, b) = run_world(SITES, _late)
    for seen, own, other in ((a_seen, a, b), (b_seen, b, a)):
        zero = torch.zeros_like(own[0])
        for number in range(1, 3):
            late = (own[number - 1] + other[number - 1]) / 2 if number else zero
            change = late + (own[number] - own[number - 1]) / 2
            assert torch.allclose(seen[number], seen[number - 1] - 0.5 * change, rtol=1e-5, atol=1e-6)


def _strangers(world: World, what: str) -> str:
    module = Stack(seed=3 if what != "weights" or world.rank == 0 else 4)
    if what == "parameters" and world.rank == 1:
        module = Toy()  # type: ignore[assignment]
    same = {"corpus": "a" if what != "corpus" or world.rank == 0 else "b"}
    try:
        Group(world, {"inner_steps": 2}, module=module, same=same)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["weights", "parameters", "corpus"])
def test_i19_groups_that_do_not_start_alike_are_refused_by_name(what: str) -> None:
    for said in run_world(SITES, _strangers, what):
        assert f"group 1 and group 0 do not start from the same {what}" in said


def _gone_astray(world: World) -> str:
    group = Group(world, {"inner_steps": 2})
    group.train(2)
    if world.rank == 1:
        group.sync.fragments[0].momentum[3] += 1e-7
    try:
        group.train(2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return str(group.sync.step)


def test_a_group_whose_outer_state_differs_is_left_out_and_stops_alone() -> None:
    results = run_world([("site", 3)], _gone_astray)
    assert results[0] == results[2] == "4"
    assert results[1].startswith("SyncError: group 1: its outer weights or momentum of fragment 0")
