"""The cut inside a group, its size and the order of its ranks do not matter: the invariant I12."""

import pytest
import torch

from sync_toy import Group, draw
from thinwire.comm.world import World
from worlds import run_world

CUT = ("replica", "node", "node")
"""zero2 in groups of more than one rank."""


def _shards(
    world: World, groups: list[list[int]] | None, codec: str, cuts: list[tuple[str, str, str]]
) -> tuple[torch.Tensor, int, int, int]:
    """Outer weights, the largest number of peer groups of a fragment, what was sent, what the formula says."""
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
    assert {peer_groups for _, peer_groups, _, _ in fours} == {1}
    assert max(peer_groups for _, peer_groups, _, _ in mixed) > 1


def test_i12_groups_may_differ_in_cut_and_in_the_order_of_their_ranks() -> None:
    """zero1 against zero3, the second group's ranks among those of the first."""
    cuts = [("replica", "replica", "node"), ("node", "node", "node")]
    single = run_world([("site", 2)], _shards, None, "fp32", cuts)[0][0]
    for groups in ([[0, 1], [2, 3]], [[1, 2], [0, 3]]):
        for outer, _, sent, formula in run_world([("flat", 4)], _shards, groups, "fp32", cuts):
            assert torch.allclose(outer, single, rtol=1e-4, atol=1e-5)
            assert sent == formula > 0
