"""I9: whatever the cuts, every element is exchanged exactly once, by one rank of each group."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import PlanError
from thinwire.sync.peers import find_peer_groups, meet

Cut = list[tuple[int, list[tuple[int, int]]]]


@st.composite
def cuts(draw: st.DrawFn) -> list[Cut]:
    """Groups of any size, each cutting `total` elements anywhere and dealing the parts out anyhow."""
    total, rank, groups = draw(st.integers(1, 60)), 0, []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        edges = sorted({0, total, *draw(st.lists(st.integers(1, total), max_size=6))})
        owned: dict[int, list[tuple[int, int]]] = {rank + i: [] for i in range(size)}
        for part in pairwise(edges):
            owned[rank + draw(st.integers(0, size - 1))].append(part)
        groups.append(list(owned.items()))
        rank += size
    return groups


@given(cuts())
def test_i9_peer_groups_cover_every_element_once_with_its_owners(groups: list[Cut]) -> None:
    peer_groups = find_peer_groups(groups)
    covered = Counter(e for ranges in peer_groups.values() for a, b in ranges for e in range(a, b))
    total = max(b for _, ranges in groups[0] for _, b in ranges)
    assert covered == Counter(range(total))
    for peers, ranges in peer_groups.items():
        assert ranges == sorted(ranges)
        for rank, group in zip(peers, groups, strict=True):
            owned = {e for a, b in dict(group)[rank] for e in range(a, b)}
            assert all(e in owned for a, b in ranges for e in range(a, b))


def test_groups_cut_alike_make_one_peer_group_for_each_rank() -> None:
    groups: list[Cut] = [[(0, [(0, 5)]), (1, [(5, 9)])], [(2, [(0, 5)]), (3, [(5, 9)])]]
    assert find_peer_groups(groups) == {(0, 2): [(0, 5)], (1, 3): [(5, 9)]}


def test_a_gap_or_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="not once"):
        find_peer_groups([[(0, [(0, 4)]), (1, [(5, 9)])]])
    with pytest.raises(PlanError, match="do not train the same model"):
        find_peer_groups([[(0, [(0, 4)])], [(1, [(0, 5)])]])


def test_overlaps_of_ranges() -> None:
    assert meet([(0, 4), (6, 9)], [(2, 7)]) == [(2, 4), (6, 7)]
