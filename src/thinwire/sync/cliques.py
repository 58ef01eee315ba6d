"""Who exchanges which elements with whom: interval intersections of what the ranks of every group own. Pure.

Elements are numbered in the canonical order: the trained parameters back to back, without padding. Every group owns each
element exactly once. A clique is a tuple of ranks, one of each group, that own the same elements and so exchange them
directly. Groups cut alike make K cliques; groups of other sizes or cuts make more, smaller ones.
"""

from collections.abc import Sequence
from itertools import pairwise

from thinwire.errors import PlanError

Range = tuple[int, int]
"""Elements start .. end of the canonical order."""


def find_cliques(owned: Sequence[Sequence[tuple[int, Sequence[Range]]]]) -> dict[tuple[int, ...], list[Range]]:
    """clique -> its ranges, ascending. `owned[g]` lists (rank, ranges) for the ranks of group g.

    Raises PlanError if a group does not own every element exactly once, or the groups own different numbers of elements.
    """
    spans = [_spans(group, number) for number, group in enumerate(owned)]
    ends = {group[-1][1] if group else 0 for group in spans}
    if len(ends) != 1:
        raise PlanError(f"the groups do not train the same model: they own {sorted(ends)} elements")
    edges = sorted({edge for group in spans for start, end, _ in group for edge in (start, end)})
    positions = [0] * len(spans)
    cliques: dict[tuple[int, ...], list[Range]] = {}
    for start, end in pairwise(edges):
        for number, group in enumerate(spans):
            while group[positions[number]][1] <= start:
                positions[number] += 1
        clique = tuple(group[position][2] for group, position in zip(spans, positions, strict=True))
        ranges = cliques.setdefault(clique, [])
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return dict(sorted(cliques.items()))


def _spans(group: Sequence[tuple[int, Sequence[Range]]], number: int) -> list[tuple[int, int, int]]:
    """(start, end, rank), ascending and without a gap."""
    spans = sorted((start, end, rank) for rank, ranges in group for start, end in ranges if end > start)
    at = 0
    for start, end, rank in spans:
        if start != at:
            raise PlanError(f"group {number} owns elements {min(at, start)} to {max(at, start)} not once (rank {rank})")
        at = end
    return spans


def meet(mine: Sequence[Range], theirs: Sequence[Range]) -> list[Range]:
    """Where two ascending lists of ranges overlap."""
    met = [(max(a, c), min(b, d)) for a, b in mine for c, d in theirs]
    return [(start, end) for start, end in met if start < end]
