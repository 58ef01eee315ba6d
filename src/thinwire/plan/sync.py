"""`[plan.sync]`: how replicas that cannot exchange gradients every step synchronise once a round (DiLoCo).

Groups inside `level` synchronise every step, as the partition says; across `level` they synchronise once a round.
`SyncConfig` is what a user writes, `Sync` what it resolves to: every decision spelled out, one space for all kinds. A kind
sets what the user does not; some defaults depend on the number of groups. No torch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from thinwire.config import Frozen, explain
from thinwire.errors import PlanError
from thinwire.plan.compression import BLOCK_CODECS, OuterCodecName, Rounding
from thinwire.plan.rounds import Order, Schedule, fragment_count

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
is a round late diverges once momentum + (share of the way that a round goes) / gap reaches 1, so the momentum is that
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


Aggregate = Literal["mean", "tokens", "median", "trimmed"]


class SyncConfig(Frozen):
    """What a user decides; what is left out, the kind's preset or the default decides."""

    renamed: ClassVar[Mapping[str, str]] = {"lead": "staleness_bound"}
    kind: Kind = "diloco"
    level: str | None = None
    """Groups inside it synchronise every step, across it and the levels outside it once a round. Default: the outermost."""
    sum_inside: str | None = None
    """The groups inside a member of this level add up what they changed, uncoded, before one sum of them travels farther."""
    inner_steps: int = Field(default=30, ge=1, le=10**6)
    fragments: int | str | None = None
    order: Order = "strided"
    delay: int | None = Field(default=None, ge=0)
    staleness_bound: int | None = Field(default=None, ge=1)
    mix: float | None = Field(default=None, ge=0, le=1)
    outer_lr: float | None = Field(default=None, gt=0, le=1e6)
    outer_momentum: float | None = Field(default=None, ge=0, lt=1)
    codec: OuterCodecName | None = None
    block: Literal[64, 128, 256] = 128
    rounding: Rounding = "nearest"
    error_feedback: bool | None = None
    aggregate: Aggregate = "mean"
    gap_penalty: bool | None = None
    clip: float | None = Field(default=None, gt=0, le=1e30)

    @field_validator("fragments")
    @classmethod
    def _countable(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            try:
                fragment_count(value, 1)
            except PlanError as error:
                raise ValueError(str(error).removeprefix("sync.")) from None
        return value

    def resolve(self, levels: Sequence[tuple[str, int]]) -> "Sync":
        """Every decision for (name, fanout) of each level, inner to outer. Raises PlanError with one sentence."""
        names = [name for name, _ in levels]
        level = self.level or names[-1]
        if level not in names:
            raise PlanError(f"sync.level = {level!r} is no level; there are {', '.join(names)}")
        groups = math.prod(fanout for _, fanout in levels[names.index(level) :])
        summed = self._summed(level, levels)
        given = self.model_dump(exclude_none=True)
        default_lr = [lr for least, lr in OUTER_LR if least <= groups][-1]
        preset = dict(PRESETS[self.kind])
        if preset.get("delay") == 1 and self.inner_steps > 2:
            preset["delay"] = min(least_delay(groups, summed), self.inner_steps - 1)
        decided = {"outer_lr": default_lr, **preset, **given, "level": level, "groups": groups, "summed": summed}
        if decided.get("late"):
            if self.delay is not None and self.delay != self.inner_steps:
                raise PlanError(f"sync.delay: kind {self.kind!r} applies one whole round late; leave delay out")
            decided["delay"] = self.inner_steps
        try:
            return Sync.model_validate(decided)
        except ValidationError as error:
            raise PlanError(f"sync: {explain(error)}") from None

    def _summed(self, level: str, levels: Sequence[tuple[str, int]]) -> int:
        """How many groups add up what they changed before it travels farther."""
        if self.sum_inside is None:
            return 1
        names = [name for name, _ in levels]
        first = names.index(level)
        possible = names[first:-1]
        if self.sum_inside not in possible:
            given = f"sync.sum_inside = {self.sum_inside!r}"
            if not possible:
                raise PlanError(
                    f"{given}: with sync.level = {level!r} no level joins some of the groups, but not all; leave it out, or "
                    f"set a sync.level further inside"
                )
            raise PlanError(
                f"{given} must be one of {', '.join(possible)}: levels that join groups, but not all of them"
            )
        return math.prod(fanout for _, fanout in levels[first : names.index(self.sum_inside) + 1])


class Sync(Frozen):
    """A point of the space. The defaults are plain DiLoCo's."""

    renamed: ClassVar[Mapping[str, str]] = {"lead": "staleness_bound"}
    kind: Kind
    level: str
    groups: int = Field(ge=1)
    """M, the number of worker groups."""
    sum_inside: str | None = None
    summed: int = Field(default=1, ge=1)
    """k, how many groups add up what they changed before one sum of them travels farther; 1: none do."""
    inner_steps: int = Field(ge=1)
    """H, steps between two rounds of the same fragment."""
    fragments: int | str = 1
    """F, or "n blocks": as many fragments as it takes to have n blocks in each."""
    order: Order = "strided"
    delay: int = 0
    """Steps from sending to applying (tau)."""
    staleness_bound: int | None = Field(default=None, ge=1)
    """How many steps a group may be ahead of the slowest one; None: as many as rounds let it."""
    late: bool = False
    """Applied one whole round later, after that round's own change was taken: CO2 and eager updates."""
    mix: float = Field(default=0.0, ge=0, le=1)
    """What is kept of a group's own weights when a round is applied (alpha): 0 takes the outer weights, 1 ignores them."""
    outer_lr: float
    outer_momentum: float = 0.9
    nesterov: bool = True
    own_fresh: bool = False
    """A group's own part of the mean change is this round's, the others' the last one's (eager updates)."""
    gap_penalty: bool = False
    """Divide a late change, element by element, by how far the weights have moved since (CO2)."""
    clip: float | None = None
    """Largest magnitude of an element of the outer momentum."""
    codec: OuterCodecName = "fp32"
    block: int = 128
    rounding: Rounding = "nearest"
    error_feedback: bool = False
    feedback_decay: float = 1.0
    """What is kept of the residual from round to round (SparseLoCo uses 0.95)."""
    aggregate: Aggregate = "mean"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if isinstance(self.fragments, int) and not 1 <= self.fragments <= self.inner_steps:
            raise ValueError(
                f"fragments = {self.fragments} must be between 1 and inner_steps = {self.inner_steps}: one is sent at a time"
            )
        if self.delay >= self.inner_steps and not self.late:
            raise ValueError(
                f"delay = {self.delay} must be below inner_steps = {self.inner_steps}; try {self.inner_steps - 1}"
            )
        if self.late and self.fragments != 1:
            raise ValueError(f"kind {self.kind!r} sends the whole model at once; leave fragments out")
        if self.own_fresh and self.aggregate != "mean":
            raise ValueError(
                f"aggregate = {self.aggregate!r}: kind {self.kind!r} replaces its own part of the mean; leave aggregate out"
            )
        if self.sum_inside is not None:
            self._summable(self.sum_inside)
        if self.aggregate in ("trimmed", "median") and self.groups < 3:
            raise ValueError(
                f"aggregate {self.aggregate!r} needs at least 3 groups, there are {self.groups}; use 'mean'"
            )
        self._meaningful()
        return self

    def _summable(self, level: str) -> None:
        """Raises ValueError for a setting that needs to know each group's own contribution, or sums that nobody makes."""
        if self.groups % self.summed or not 1 < self.summed < self.groups:
            raise ValueError(f"sum_inside = {level!r} would add up {self.summed} of {self.groups} groups; leave it out")
        for key, value in (("kind", self.own_fresh), ("error_feedback", self.error_feedback)):
            if value:
                raise ValueError(
                    f"sum_inside = {level!r}: {key} = {getattr(self, key)!r} needs what each group sent, and only sums "
                    f"travel; leave sum_inside out"
                )
        if self.aggregate not in ("mean", "tokens"):
            raise ValueError(
                f"sum_inside = {level!r}: aggregate = {self.aggregate!r} needs every contribution by itself; use 'mean'"
            )

    def _meaningful(self) -> None:
        """Raises ValueError for a setting that would do nothing, or nothing sound, at this point."""
        if self.staleness_bound is not None and (self.groups == 1 or self.staleness_bound >= self.inner_steps):
            why = "there is one group" if self.groups == 1 else f"rounds of inner_steps = {self.inner_steps} do as much"
            raise ValueError(f"staleness_bound = {self.staleness_bound} keeps groups together, and {why}; leave it out")
        if self.groups == 1 and self.codec != "fp32":
            way_out = "use kind = 'diloco'" if "codec" in PRESETS[self.kind] else "leave codec out"
            raise ValueError(
                f"codec = {self.codec!r} makes what groups send each other smaller, and there is one group: its outer steps "
                f"would lose precision for nothing; {way_out}, or let there be more groups"
            )
        if self.gap_penalty and (self.nesterov or not self.late):
            raise ValueError(
                f"gap_penalty divides a change that is one round late, without Nesterov momentum; kind {self.kind!r} has "
                f"none such; use kind = 'co2', or leave gap_penalty out"
            )
        if self.clip is not None and self.nesterov:
            raise ValueError(
                f"clip = {self.clip:g} bounds the outer step only without Nesterov momentum, which kind {self.kind!r} has; "
                f"use kind = 'co2', or leave clip out"
            )
        if self.error_feedback and self.codec == "fp32":
            raise ValueError(
                "error_feedback carries what coding loses, and codec 'fp32' loses nothing; set a codec such as 'int8', or "
                "error_feedback = false"
            )
        if self.codec not in BLOCK_CODECS and (self.rounding != "nearest" or self.block != 128):
            key = "block" if self.rounding == "nearest" else "rounding"
            raise ValueError(
                f"{key} = {getattr(self, key)!r} belongs to the block codecs ({', '.join(BLOCK_CODECS)}), not to "
                f"{self.codec!r}; leave it out, or set codec = 'int8'"
            )

    def schedule(self, fragments: int) -> Schedule:
        """The table of sends and applies, for F `fragments`. Raises PlanError if there are more than inner steps."""
        if fragments > self.inner_steps:
            raise PlanError(
                f"sync: {fragments} fragments are more than inner_steps = {self.inner_steps}; raise inner_steps or use "
                f"fragments = {self.inner_steps}"
            )
        return Schedule(self.inner_steps, fragments, self.delay)
