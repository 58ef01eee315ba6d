"""How the states of a flat buffer are sharded, and how they travel: the depth of each state, and the codecs of its hops."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from thinwire.comm.codecs.codec import Codec, make_codec
from thinwire.errors import PlanError
from thinwire.plan.plan import Plan

Codecs = dict[int, Codec]


def codecs_of(plan: Plan, master: torch.dtype) -> tuple[Codecs, Codecs, frozenset[int]]:
    """(weights by level, gradients by level, levels whose weights travel as differences).

    Raises PlanError where a codec cannot carry `master` numbers without saying so (fp64).
    """
    if master == torch.float64 and (plan.compression.weights or plan.compression.grads):
        raise PlanError("codecs carry fp32 numbers, this model is fp64; leave plan.compression out, or train in fp32")
    names = list(plan.level_names)
    sides: list[Codecs] = []
    for direction in (plan.compression.weights, plan.compression.grads):
        made = {
            names.index(level): make_codec(
                name.removeprefix("delta-"), block=plan.compression.block, rounding=plan.compression.rounding
            )
            for level, name in direction.items()
            if name not in ("fp32", "lowrank")
        }
        sides.append(made)
    deltas = frozenset(
        names.index(level) for level, name in plan.compression.weights.items() if name.startswith("delta-")
    )
    return sides[0], sides[1], deltas


@dataclass(frozen=True)
class LowRankHop:
    """The gradient hop, the last one, that sums matrices of low rank: its level, that rank, and the step it begins at."""

    level: int
    rank: int
    first_step: int


def low_rank_of(plan: Plan) -> LowRankHop | None:
    """The gradient hop that sums matrices of low rank, if there is one."""
    levels = [plan.level_names.index(level) for level, name in plan.compression.grads.items() if name == "lowrank"]
    return LowRankHop(levels[0], plan.compression.rank, plan.compression.rank_from) if levels else None


@dataclass(frozen=True)
class Sharding:
    """How the states of a flat buffer are sharded, and how they travel: depths lp, lg, lo and a codec per level."""

    lp: int
    lg: int
    lo: int
    weights: Mapping[int, Codec]
    grads: Mapping[int, Codec]
    delta_levels: frozenset[int]
    """Levels whose weights travel as differences from what the receiver holds."""
    feedback_level: int | None
    """The gradient hop whose coding error is carried over to the next step."""
    low_rank: LowRankHop | None = None
