"""What the kinds of `[plan.sync]` set unless the user does, and defaults that depend on the number of groups. No torch."""

from typing import Any, Literal

Kind = Literal["local_sgd", "diloco", "streaming_diloco", "eager", "co2", "sparse"]

PRESETS: dict[Kind, dict[str, Any]] = {
    "local_sgd": {"outer_lr": 1.0, "outer_momentum": 0.0},
    "diloco": {},
    "streaming_diloco": {"fragments": "3 blocks", "delay": 1, "mix": 0.5, "codec": "e3m0"},
    "eager": {"late": True, "own_fresh": True},
    "co2": {"late": True, "outer_lr": 1.0, "outer_momentum": 0.2, "nesterov": False, "gap_penalty": True, "clip": 1.0},
    "sparse": {
        "codec": "topk", "error_feedback": True, "feedback_decay": 0.95, "outer_lr": 1.0, "outer_momentum": 0.0,
    },
}  # fmt: skip
"""What a kind sets unless the user does.

local_sgd: the average of the groups' weights (arXiv 1805.09767). diloco: outer Nesterov momentum on the groups' mean
change (2311.08105). streaming_diloco: fragments, 4-bit outer gradients, overlap and mixing (2501.18512); with three
groups or more its delay is longer, see `least_delay`. eager: one round late, but a group's own part of the change is
fresh (2502.12996). co2: one round late, with staleness-gap penalty and clipped outer momentum (2401.16265); a change that
is a round late swings for ever once momentum + (share of the way that a round goes) / gap reaches 1, so the momentum is that
of the authors' example, 0.2, and not their code's default, 0.5. sparse: top-k per chunk in 2 bits with error feedback
instead of momentum (SparseLoCo, 2508.15706).
"""

OUTER_LR = ((1, 0.4), (2, 0.6), (4, 0.6), (8, 0.8))
"""Tuned outer learning rates by number of groups (2503.09799, figure 7); the nearest smaller entry counts."""


def least_delay(groups: int, summed: int = 1) -> int:
    """Steps behind which a round can travel at best, one for each of its hops.

    Of three groups or more it comes back in a second one; `summed` groups that add up first, and share what comes out,
    take one before and one after.
    """
    return (1 if groups // summed <= 2 else 2) + (2 if summed > 1 else 0)
