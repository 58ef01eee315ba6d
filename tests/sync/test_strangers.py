"""Groups that do not start alike, or diverge: the invariants I7 and I19."""

import pytest

from partition_toy import Toy
from sync_toy import SITES, Group, Stack, diverging
from thinwire.comm.world import World
from thinwire.errors import ConfigError, SyncError
from worlds import run_world


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


def _diverging(world: World) -> tuple[str, list[int], list[int]]:
    """Three groups of two ranks; one rank of group 1 alters its outer state between a send and an apply."""
    sync = {"kind": "streaming_diloco", "inner_steps": 4, "fragments": 2, "delay": 2, "codec": "fp32"}
    group = Group(world, sync, cut=("node", "node", "node"))
    said = diverging(group, 3)
    if said:
        return said, [], []
    group.sync.settle()
    return str(group.sync.step), group.state(), sorted(group.sync.present)


def test_a_group_whose_outer_state_differs_stops_with_all_its_ranks_and_the_others_go_on() -> None:
    results = run_world([("node", 2), ("site", 3)], _diverging)
    for said, _, _ in results[2:4]:
        assert said.startswith("group 1: its outer weights or momentum of fragment 0 are not those of the other groups")
    others = [results[rank] for rank in (0, 1, 4, 5)]
    assert all((said, present) == ("14", [0, 2]) for said, _, present in others)
    assert results[0][1] == results[4][1]
    assert results[1][1] == results[5][1]


def _diverged_at_the_end(world: World, kind: str) -> str:
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
    first, second = run_world(SITES, _diverged_at_the_end, kind)
    assert first == "goes on with [0]"
    assert "group 1: its outer weights or momentum are not those of the other groups after the last round" in second
