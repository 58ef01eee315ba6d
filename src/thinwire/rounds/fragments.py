"""Which units of the model make a fragment. Pure.

A fragment is a set of whole units of the canonical order, so that every rank of a group owns an equal share of each
fragment and sends it itself. Blocks are dealt out (`strided`: block b to fragment b mod F, which Streaming DiLoCo found
slightly better; `sequential`: F runs of neighbours); the other units, such as embedding and head, go to whichever
fragment is lightest, largest first.
"""

import re
from collections.abc import Sequence
from typing import Literal

from thinwire.errors import PlanError

Order = Literal["strided", "sequential"]
_BLOCK = re.compile(r"^(?:.*\.)?(\d+)$")


def fragment_count(asked: int | str, blocks: int) -> int:
    """F from a number or from "n blocks" (as many fragments as it takes to have n blocks in each). Raises PlanError."""
    if isinstance(asked, int):
        return asked
    found = re.fullmatch(r"(\d+) blocks?(?: each)?", asked.strip())
    if found is None or int(found[1]) == 0:
        raise PlanError(f'sync.fragments = {asked!r} is neither a number nor like "3 blocks"')
    return max(1, -(-blocks // int(found[1])))


def deal(units: Sequence[tuple[str, int]], fragments: int, order: Order) -> list[list[int]]:
    """For each fragment the indices of its units, ascending. `units` are (name, elements) in canonical order.

    Raises PlanError if there are more fragments than units.
    """
    if fragments > len(units):
        raise PlanError(f"sync.fragments = {fragments}, but the model has only {len(units)} units; try {len(units)}")
    blocks = [index for index, (name, _) in enumerate(units) if _BLOCK.match(name)]
    rest = sorted((i for i in range(len(units)) if i not in blocks), key=lambda i: (-units[i][1], i))
    out: list[list[int]] = [[] for _ in range(fragments)]
    for position, index in enumerate(blocks):
        chosen = position % fragments if order == "strided" else position * fragments // len(blocks)
        out[chosen].append(index)
    for index in rest:
        empty = [f for f in range(fragments) if not out[f]]
        out[min(empty or range(fragments), key=lambda f: (sum(units[i][1] for i in out[f]), f))].append(index)
    return [sorted(fragment) for fragment in out]
