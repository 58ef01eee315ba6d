"""Groups that add up what they changed inside a fast level, before one sum of them travels farther."""

from typing import Any

import pytest
import torch

from sync_toy import Group, diverging
from thinwire.comm import world as world_module
from thinwire.comm.codecs.codec import make_codec
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.plan.rounds import exchange_bytes, hops_due, inside_bytes
from thinwire.plan.sync import SyncConfig
from worlds import run_world

FOUR = [("node", 2), ("site", 2)]
"""Four groups of one rank, two to a node."""
SUMS = {"level": "node", "sum_inside": "node"}


def _round(world: World, sync: dict[str, Any], weights: dict[int, float] | None = None) -> tuple[torch.Tensor, ...]:
    """(what this group changed in one round, by how much the outer weights moved)."""
    group = Group(world, {"inner_steps": 2, "outer_lr": 1.0, "outer_momentum": 0.0, **sync})
    changes, (fragment,) = group.changes(), group.sync.fragments
    before = fragment.weights.clone()
    group.train(2, tokens=(weights or {}).get(world.rank, 1.0))
    return changes[0], before - fragment.weights


def _coded(codec: str, x_n: torch.Tensor) -> torch.Tensor:
    coder = make_codec(codec)
    return coder.decode(coder.encode(x_n), len(x_n), x_n.dtype)


def _by_hand(changes: list[torch.Tensor], k: int, codec: str | None) -> torch.Tensor:
    """The mean over places of the means of the `k` groups in each, those coded in k chunks."""
    n = len(changes[0])
    chunk = -(-n // k)
    padded = [torch.nn.functional.pad(change, (0, k * chunk - n)) for change in changes]
    means = [sum(padded[first : first + k]) / k for first in range(0, len(padded), k)]
    coded = [m if codec is None else torch.cat([_coded(codec, part) for part in m.view(k, chunk)]) for m in means]
    return (sum(coded) / len(coded))[:n]


@pytest.mark.parametrize("codec", ["fp32", "e3m0", "int8"])
def test_the_mean_of_the_places_means_is_what_comes_out_everywhere_bit_for_bit(codec: str) -> None:
    results = run_world(FOUR, _round, {**SUMS, "codec": codec})
    expected = _by_hand([change for change, _ in results], 2, None if codec == "fp32" else codec)
    for _, moved in results:
        assert torch.allclose(moved, expected, atol=1e-6)
        assert torch.equal(moved, results[0][1])
    assert expected.abs().max() > 1e-3


def test_uncoded_sums_give_what_an_exchange_of_every_group_with_every_other_gives() -> None:
    tiers, flat = (run_world(FOUR, _round, {**SUMS, **how, "codec": "fp32"}) for how in ({}, {"sum_inside": None}))
    assert torch.allclose(tiers[0][1], flat[0][1], atol=1e-7)


def _through_sockets(world: World, sync: dict[str, Any]) -> torch.Tensor:
    world_module.find_same_host = lambda *_, **__: None
    return _round(world, sync)[1]


def test_memory_of_the_host_and_sockets_give_the_same_bits() -> None:
    sync = {**SUMS, "codec": "e3m0"}
    near, far = run_world(FOUR, _round, sync), run_world(FOUR, _through_sockets, sync)
    assert torch.equal(near[0][1], far[0])


def test_tokens_weigh_and_a_group_of_none_is_left_out() -> None:
    weights = {0: 1.0, 1: 2.0, 2: 0.0, 3: 5.0}
    for how, counted in (("tokens", [1.0, 2.0, 0.0, 5.0]), ("mean", [1.0, 1.0, 0.0, 1.0])):
        results = run_world(FOUR, _round, {**SUMS, "aggregate": how, "codec": "fp32"}, weights)
        expected = sum(w * change for w, (change, _) in zip(counted, results, strict=True)) / sum(counted)
        for _, moved in results:
            assert torch.allclose(moved, expected, atol=1e-6), how


def _agreement(world: World, sync: dict[str, Any]) -> tuple[list[list[int]], dict[str, dict[str, int]], int]:
    """Hashes of the outer state after every step, what was sent, what this rank's own formula says in all."""
    group = Group(world, sync)
    world.ledger.drain()
    states = []
    for _ in range(16):
        group.train(1)
        states.append(group.state())
    group.sync.settle()
    sent = world.ledger.drain().sent_bytes()
    whole = sum(group.sync.bytes_of(each.fragment) for each in group.sync.schedule.table(16))
    outer = {level: {k: v for k, v in of.items() if k.startswith("outer-")} for level, of in sent.items()}
    return states, {level: of for level, of in outer.items() if of}, whole


def _numbers(fragments: int) -> list[int]:
    """Elements of each fragment of the toy."""
    return run_world([("site", 1)], _count, fragments)[0]


def _count(world: World, fragments: int) -> list[int]:
    return [f.numel for f in Group(world, {"inner_steps": 8, "fragments": fragments}).sync.fragments]


@pytest.mark.parametrize(
    ("levels", "delay"), [(FOUR, 0), (FOUR, 1), (FOUR, 3), (FOUR, 7), ([("node", 2), ("site", 3)], 5)]
)
def test_i7_i8_all_groups_hold_the_same_outer_state_and_send_the_formulas_bytes(levels: Any, delay: int) -> None:
    sync = {**SUMS, "kind": "streaming_diloco", "inner_steps": 8, "fragments": 3, "delay": delay}
    places = levels[1][1]
    across, inside = 0, [0, 0]
    for n in _numbers(3) * 2:  # two rounds in 16 steps
        across += exchange_bytes(n, groups=2 * places, codec="e3m0", block=128, summed=2)
        inside = [have + more for have, more in zip(inside, inside_bytes(n, summed=2), strict=True)]
    for states, sent, whole in run_world(levels, _agreement, sync):
        assert len({tuple(state) for state in states}) > 3
        assert sent["node"] == {"outer-sum": inside[0], "outer-spread": inside[1]}
        assert sum(sent["site"].values()) == across
        assert whole == across + sum(inside)
    results = run_world(levels, _agreement, sync)
    assert len({str(states) for states, _, _ in results}) == 1


def test_a_place_sends_as_much_as_one_group_would_instead_of_as_much_as_its_groups() -> None:
    n, how = 4096, {"codec": "e3m0", "block": 128}
    one_group_of_two_ranks = 2 * exchange_bytes(n // 2, groups=2, **how)
    summed = 2 * exchange_bytes(n, groups=4, summed=2, **how)
    assert summed == one_group_of_two_ranks + 2 * 16  # a header more in every message
    assert inside_bytes(n, summed=2) == (4 * n // 2 + 16, 4 * n // 2)


def test_hops_share_the_delay() -> None:
    assert hops_due(3, far=1, sums=True) == [1, 2]
    assert hops_due(8, far=2, sums=True) == [2, 4, 6]
    assert hops_due(5, far=2, sums=False) == [3]
    assert hops_due(5, far=1, sums=False) == []


@pytest.mark.parametrize(("levels", "delay"), [(FOUR, 3), ([("node", 2), ("site", 3)], 4)])
def test_the_default_delay_has_a_step_for_every_hop(levels: Any, delay: int) -> None:
    assert SyncConfig(kind="streaming_diloco", **SUMS).resolve(levels).delay == delay
    assert SyncConfig(kind="streaming_diloco", inner_steps=3, fragments=1, **SUMS).resolve(levels).delay == 2


def _diverging(world: World) -> tuple[str, list[int], list[int], dict[str, int]]:
    """Six groups in three places; group 3, in the second one, alters its outer state between a send and an apply."""
    sync = {**SUMS, "kind": "streaming_diloco", "inner_steps": 4, "fragments": 2, "delay": 2, "codec": "fp32"}
    group = Group(world, sync)
    said = diverging(group, 3)
    if said:
        return said, [], [], {}
    world.ledger.drain()
    group.train(4)
    group.sync.settle()
    sent = {k: v for of in world.ledger.drain().sent_bytes().values() for k, v in of.items() if v}
    return str(group.sync.step), group.state(), sorted(group.sync.present), sent


def test_a_diverged_group_is_named_and_the_others_go_on_without_sums() -> None:
    results = run_world([("node", 2), ("site", 3)], _diverging)
    assert results[3][0].startswith("group 3: its outer weights or momentum of fragment 0 are not those of the other")
    others = [result for rank, result in enumerate(results) if rank != 3]
    assert all((said, present) == ("18", [0, 1, 2, 4, 5]) for said, _, present, _ in others)
    assert len({str(states) for _, states, _, _ in others}) == 1
    assert all("outer-sum" not in sent and sent["outer-return"] > 0 for _, _, _, sent in others)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"sum_inside": "site"},
            "sync.sum_inside = 'site' must be one of node: levels that join groups, but not all",
        ),
        ({"sum_inside": "rack"}, "must be one of node"),
        ({"level": "site", "sum_inside": "node"}, "with sync.level = 'site' no level joins some of the groups"),
        ({"kind": "eager"}, "kind = 'eager' needs what each group sent, and only sums travel"),
        ({"codec": "int4", "error_feedback": True}, "error_feedback = True needs what each group sent"),
        ({"aggregate": "median"}, "aggregate = 'median' needs every contribution by itself; use 'mean'"),
    ],
)
def test_what_sums_cannot_do_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said.replace("(", r"\(")):
        SyncConfig.model_validate({**SUMS, **given}).resolve(FOUR)
    with pytest.raises(PlanError, match="would add up 1 of 2 groups; leave it out"):
        SyncConfig.model_validate(SUMS).resolve([("node", 1), ("site", 2)])
