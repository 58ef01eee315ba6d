"""Outer synchronisation on real groups of ranks: the invariants I1-I5, I7, I10-I12, I18, I19."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from partition_toy import Toy
from sync_toy import WIDTH, Group, Stack, alike, draw, sgd
from thinwire.comm.world import World
from thinwire.errors import ConfigError, SyncError
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


def _second_hops(world: World, delay: int | None) -> list[int]:
    """Steps after which an exchange was on its last hop and not applied yet."""
    group = Group(world, {"kind": "streaming_diloco", "fragments": 1, "inner_steps": 6, "delay": delay})
    seen = []
    for _ in range(12):
        group.train(1)
        if any(pending.hops == 1 for pending in group.sync.pending):
            seen.append(group.sync.step)
    group.sync.settle()
    return seen


def test_of_three_groups_the_second_hop_travels_behind_a_step_unless_the_delay_is_one() -> None:
    assert run_world([("site", 3)], _second_hops, None) == [[7]] * 3  # sent after 6, applied after 8; 12's is settled
    assert run_world([("site", 3)], _second_hops, 1) == [[]] * 3
    assert run_world([("site", 3)], _second_hops, 5) == [[9, 10]] * 3


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


CUT = ("replica", "node", "node")
"""zero2 in groups of more than one rank."""


def _shards(
    world: World, groups: list[list[int]] | None, codec: str, cuts: list[tuple[str, str, str]]
) -> tuple[torch.Tensor, int, int, int]:
    """Outer weights, the largest number of cliques of a fragment, what was sent, what the formula says."""
    number = world.rank if groups is None else next(g for g, ranks in enumerate(groups) if world.rank in ranks)
    cut = ("replica", "replica", "replica") if groups is None else cuts[number]
    sync = {"kind": "streaming_diloco", "inner_steps": 4, "fragments": 2, "delay": 1, "codec": codec}
    group = Group(world, sync, cut=cut, groups=groups)
    world.ledger.drain()
    group.train(9, batch=lambda step, rank: draw(step, number))
    group.sync.settle()
    sent = sum(e.sent_bytes for e in world.ledger.drain().entries if e.purpose.startswith("outer-"))
    formula = sum(group.sync.bytes_of(each.fragment) for each in group.sync.schedule.table(9))
    return group.outer(), max(sum(map(bool, places)) for places in group.sync.links.places), sent, formula


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_i12_the_cut_inside_the_groups_does_not_matter_and_groups_may_differ_in_size(codec: str) -> None:
    single = run_world([("site", 2)], _shards, None, codec, [CUT, CUT])[0][0]
    fours = run_world([("flat", 4)], _shards, [[0, 1], [2, 3]], codec, [CUT, CUT])
    mixed = run_world([("flat", 6)], _shards, [[0, 1], [2, 3, 4, 5]], codec, [CUT, CUT])
    for outer, _, sent, formula in (*fours, *mixed):
        assert torch.allclose(outer, single, rtol=1e-4, atol=1e-5 if codec == "fp32" else 2e-3)
        assert sent == formula > 0
    assert {cliques for _, cliques, _, _ in fours} == {1}
    assert max(cliques for _, cliques, _, _ in mixed) > 1


def test_i12_groups_may_differ_in_cut_and_in_the_order_of_their_ranks() -> None:
    """zero1 against zero3, the second group's ranks among those of the first."""
    cuts = [("replica", "replica", "node"), ("node", "node", "node")]
    single = run_world([("site", 2)], _shards, None, "fp32", cuts)[0][0]
    for groups in ([[0, 1], [2, 3]], [[1, 2], [0, 3]]):
        for outer, _, sent, formula in run_world([("flat", 4)], _shards, groups, "fp32", cuts):
            assert torch.allclose(outer, single, rtol=1e-4, atol=1e-5)
            assert sent == formula > 0


def _aggregated(world: World, how: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What this group changed in one round, by how much the outer weights moved, what was sent."""
    group = Group(world, {"inner_steps": 2, "aggregate": how, "outer_lr": 1.0, "outer_momentum": 0.0})
    changes, (fragment,) = group.changes(), group.sync.fragments
    before = fragment.weights.clone()
    world.ledger.drain()
    group.train(2, tokens=1.0 + world.rank)
    sent = sum(e.sent_bytes for e in world.ledger.drain().entries if e.purpose.startswith("outer-"))
    return changes[0], before - fragment.weights, sent


def test_every_aggregate_of_real_groups_is_that_of_their_changes_and_costs_the_same_bytes() -> None:
    bytes_sent = set()
    for how in ("mean", "tokens", "median", "trimmed"):
        results = run_world([("site", 3)], _aggregated, how)
        parts = torch.stack([change for change, _, _ in results])
        middle = parts.median(dim=0).values
        weights = torch.tensor([1.0, 2.0, 3.0] if how == "tokens" else [1.0, 1.0, 1.0])[:, None]
        expected = middle if how in ("median", "trimmed") else (parts * weights).sum(0) / weights.sum()
        for _, moved, sent in results:
            assert torch.allclose(moved, expected, atol=1e-6), how
            bytes_sent.add(sent)
        assert (parts[0] - expected).abs().max() > 1e-3
    assert len(bytes_sent) == 1


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


def _held(world: World, feedback: bool) -> tuple[int, int]:
    sync = {"inner_steps": 3, "fragments": 2, "codec": "int8", "error_feedback": feedback}
    group = Group(world, sync, cut=("replica", "node", "node"))
    kept = [
        tensor for f in group.sync.fragments for tensor in (f.weights, f.momentum, f.residual) if tensor is not None
    ]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == group.sync.held_bytes()
    return group.sync.held_bytes(), sum(p.numel() for p in Stack().parameters())


@pytest.mark.parametrize(("feedback", "each"), [(False, 8), (True, 12)])
def test_a_group_holds_8_bytes_a_parameter_over_its_ranks_and_4_more_with_error_feedback(
    feedback: bool, each: int
) -> None:
    held = run_world([("node", 2), ("site", 2)], _held, feedback)
    for first, second in (held[:2], held[2:]):
        assert first[0] + second[0] == each * first[1]
        assert abs(first[0] - second[0]) < 0.05 * first[0]


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


def _strangers(world: World, what: str) -> str:
    module = Stack(seed=3 if what != "weights" or world.rank == 0 else 4)
    if what == "parameters" and world.rank == 1:
        module = Toy()  # type: ignore[assignment]
    if what == "frozen weights":
        module.head.requires_grad_(False).weight.data[2, 3] += 1e-6 * world.rank
    same = {"corpus": "a" if what != "corpus" or world.rank == 0 else "b"}
    try:
        Group(world, {"inner_steps": 2}, module=module, same=same)
    except ConfigError as error:
        return str(error)
    return ""


def _late_strangers(world: World) -> str:
    group = Group(world, {"inner_steps": 2})
    with group.engine.rewriting(range(len(group.engine.units))):
        for share in group.engine.shares():
            share.master.add_(1.0 + 1e-6 * world.rank)
    try:
        group.sync.start_here()
    except ConfigError as error:
        return str(error)
    return ""


def test_i19_weights_that_are_read_after_meeting_are_compared_again() -> None:
    for said in run_world(SITES, _late_strangers):
        assert "group 1 and group 0 do not start from the same weights" in said


@pytest.mark.parametrize("what", ["weights", "frozen weights", "parameters", "corpus"])
def test_i19_groups_that_do_not_start_alike_are_refused_by_name(what: str) -> None:
    for said in run_world(SITES, _strangers, what):
        assert f"group 1 and group 0 do not start from the same {what}" in said


def _gone_astray(world: World) -> tuple[str, list[int], list[int]]:
    """Three groups of two ranks; one rank of group 1 alters its outer state between a send and an apply."""
    sync = {"kind": "streaming_diloco", "inner_steps": 4, "fragments": 2, "delay": 2, "codec": "fp32"}
    group = Group(world, sync, cut=("node", "node", "node"))
    group.train(4)
    if world.rank == 3:
        group.sync.fragments[0].momentum[3] += 1e-7
    try:
        group.train(10)
    except SyncError as error:
        return str(error), [], []
    group.sync.settle()
    return str(group.sync.step), group.state(), sorted(group.sync.present)


def test_a_group_whose_outer_state_differs_stops_with_all_its_ranks_and_the_others_go_on() -> None:
    results = run_world([("node", 2), ("site", 3)], _gone_astray)
    for said, _, _ in results[2:4]:
        assert said.startswith("group 1: its outer weights or momentum of fragment 0 are not those of the other groups")
    others = [results[rank] for rank in (0, 1, 4, 5)]
    assert all((said, present) == ("14", [0, 2]) for said, _, present in others)
    assert results[0][1] == results[4][1]
    assert results[1][1] == results[5][1]


def _astray_at_the_end(world: World, kind: str) -> str:
    group = Group(world, {"kind": kind, "inner_steps": 2})
    group.train(4)
    if world.rank == 1 and kind == "eager":
        group.sync.drain()
        group.sync.pending[-1].change[3] += 1e-7
    elif world.rank == 1:
        group.sync.fragments[0].weights[3] += 1e-6
    try:
        group.sync.settle()
    except SyncError as error:
        return str(error)
    return f"goes on with {sorted(group.sync.present)}"


@pytest.mark.parametrize("kind", ["diloco", "eager"])
def test_i7_the_outer_state_a_run_ends_with_is_compared_and_of_two_groups_the_first_is_trusted(kind: str) -> None:
    first, second = run_world(SITES, _astray_at_the_end, kind)
    assert first == "goes on with [0]"
    assert "group 1: its outer weights or momentum are not those of the other groups after the last round" in second
