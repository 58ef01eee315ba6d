"""The partition: over which level each of the three states is sharded, and the names that such points have.

Parameters are sharded over levels lp, gradients over lg and optimizer states over lo, each with everything inside it; legal
is lp <= lg <= lo from inner to outer, as in AMSP (arXiv 2311.00257): a rank never holds gradients or optimizer states of
parameters that it does not own. With frozen weights lg < lp is sensible too (PaRO, 2310.06003). No torch.
"""

import itertools
import re
from collections.abc import Sequence

from thinwire.config import Frozen
from thinwire.errors import PlanError
from thinwire.plan.compression import Compression

REPLICA, ALL = "replica", "all"


class Partition(Frozen):
    """Of each of the three states: `"replica"`, or the level over which (and everything inside it) it is sharded."""

    params: str = REPLICA
    grads: str = REPLICA
    optimizer: str = REPLICA
    keep_gathered: bool = False
    """Gather a unit's weights once a step and keep them to its last backward: more memory, fewer bytes."""
    frozen_weights: bool = False
    """Most weights are frozen: gradients may be sharded less than parameters; trained weights then live with them."""

    def depths(self, levels: Sequence[str]) -> tuple[int, int, int]:
        """(lp, lg, lo) as indices into `levels`, inner to outer; -1 is `replica`. Raises PlanError if illegal."""
        lp, lg, lo = (_depth(getattr(self, name), levels, name) for name in ("params", "grads", "optimizer"))
        if not _legal((lp, lg, lo), frozen_weights=self.frozen_weights):
            nearest = _nearest_legal((lp, lg, lo), len(levels), frozen_weights=self.frozen_weights)
            rule = (
                "even with frozen weights neither parameters nor gradients may be sharded further out than optimizer states"
                if self.frozen_weights
                else "parameters may not be sharded further out than gradients, nor gradients than optimizer states"
            )
            raise PlanError(
                f"partition {self} is illegal: {rule}; the nearest legal one is "
                f"({'; '.join(_named(depth, levels) for depth in nearest)})"
            )
        return lp, lg, lo

    def __str__(self) -> str:
        return f"({self.params}; {self.grads}; {self.optimizer})"


Depths = tuple[int, int, int]


def _legal(depths: Depths, *, frozen_weights: bool) -> bool:
    lp, lg, lo = depths
    return lp <= lo and lg <= lo and (lp <= lg or frozen_weights)


def _nearest_legal(depths: Depths, levels: int, *, frozen_weights: bool) -> Depths:
    """The legal point with the fewest states changed, then by the fewest levels, then the one sharded furthest out."""

    def distance(other: Depths) -> tuple[int, int, int]:
        moved = [abs(new - old) for new, old in zip(other, depths, strict=True)]
        return sum(by > 0 for by in moved), sum(moved), -sum(other)

    every = range(-1, levels)
    return min(
        (point for point in itertools.product(every, every, every) if _legal(point, frozen_weights=frozen_weights)),
        key=distance,
    )


def _named(depth: int, levels: Sequence[str]) -> str:
    return REPLICA if depth < 0 else levels[depth]


def _depth(name: str, levels: Sequence[str], state: str) -> int:
    if name == REPLICA:
        return -1
    if name == ALL:
        return len(levels) - 1
    if name not in levels:
        raise PlanError(f"partition.{state} = {name!r} is no level; there are {REPLICA}, {', '.join(levels)} and {ALL}")
    return list(levels).index(name)


def resolve_partition(name: str, levels: Sequence[str]) -> tuple[Partition, Compression]:
    """The point that a name means on `levels` (inner to outer), and the codecs that belong to it.

    `node` below is the level of that name, else the outermost but one, else the only one. Raises PlanError.

    ddp: everything replicated. zero1/2/3 (arXiv 1910.02054): optimizer states, also gradients, also parameters sharded over
    all. hsdp, mics (2205.00119): all three sharded over the node. zero++ (2306.10209): parameters over the node, the rest
    over all, int8 weights and int4 gradients between nodes. frontier (2501.04266): parameters over the innermost level,
    gradients over the node, optimizer states over all. auto: parameters and gradients over the node, optimizer states
    over all; on a single level, where a node is one rank, that is zero1. amsp(P;G;O) (2311.00257): spelled out.
    """
    everything = levels[-1] if levels else REPLICA  # no level at all: a worker group of one rank
    node = "node" if "node" in levels else (levels[-2:] or (REPLICA,))[0]
    points = {
        "auto": (node, node, everything) if node != everything else (REPLICA, REPLICA, everything),
        "ddp": (REPLICA, REPLICA, REPLICA),
        "zero1": (REPLICA, REPLICA, everything),
        "zero2": (REPLICA, everything, everything),
        "zero3": (everything, everything, everything),
        "hsdp": (node, node, node),
        "mics": (node, node, node),
        "zero++": (node, everything, everything),
        "frontier": ((levels or (REPLICA,))[0], node, everything),
    }
    spelled = re.fullmatch(r"amsp\(([^;]+);([^;]+);([^;]+)\)", name.replace(" ", ""))
    if spelled is None and name not in points:
        raise PlanError(f"partition {name!r} is unknown; there are {', '.join(points)} and amsp(P;G;O)")
    params, grads, optimizer = spelled.groups() if spelled else points[name]
    partition = Partition(
        params=_outer(params, everything), grads=_outer(grads, everything), optimizer=_outer(optimizer, everything)
    )
    partition.depths(levels)
    if name != "zero++":
        return partition, Compression()
    between_nodes = list(levels)[list(levels).index(node) + 1 :] if levels else []
    if not between_nodes:
        raise PlanError(
            f"zero++ codes what crosses nodes, and here nothing does (levels: {', '.join(levels) or 'none'}): take zero3, "
            "which is the same partition without codecs, and name codecs in plan.compression if you want them"
        )
    return partition, Compression(
        weights=dict.fromkeys(between_nodes, "int8"), grads=dict.fromkeys(between_nodes, "int4")
    )


def _outer(name: str, everything: str) -> str:
    return everything if name == ALL else name
