"""The planner's whole answer: the best plans, and outer synchronisation where every step is too often.

Groups that agree rarely train differently, so speed alone never chooses them: they are offered beside the best plan that
agrees every step, when that one computes for less than half of its time (or when the user asks).
"""

from dataclasses import dataclass, replace
from typing import Literal

from thinwire.errors import PlanError
from thinwire.plan.sync import least_delay
from thinwire.planner.search import Found, Ranked, search
from thinwire.planner.space import Space
from thinwire.planner.whynot import fits_nowhere
from thinwire.predict.candidate import Setting, Sync
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.simulate import step_s

Outer = Literal["auto", "never", "always"]
BUSY_ENOUGH = 0.5
"""Share of compute under which agreeing every step is called too often."""
FINALISTS = 5
PLAYED_UNITS = 60_000
"""Micro-batches times blocks, over all finalists, up to which they are played through: about a second."""
STALL_ALLOWED = 0.05
INTERVALS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Answer:
    """What was found; `outer` has plans with outer synchronisation, if they were looked for."""

    every_step: Found
    outer: Found | None

    @property
    def best(self) -> Ranked:
        found = self.outer if self.outer is not None and self.outer.best else self.every_step
        return found.best[0]


def busy(ranked: Ranked) -> float:
    """Share of the step that is compute."""
    return ranked.time.compute_s / ranked.time.total


def choose(setting: Setting, space: Space, *, keep: int = 20, outer: Outer = "auto") -> Answer:
    """The best plans. Raises PlanError with the smallest change if nothing fits, ConfigError if figures are missing."""
    found = search(setting, space, keep=keep)
    if not found.best:
        raise PlanError(fits_nowhere(setting, space, found))
    possible = space.sync is None and setting.cluster.levels[-1].fanout > 1 and len(setting.cluster.levels) > 1
    wanted = outer == "always" or (outer == "auto" and busy(found.best[0]) < BUSY_ENOUGH)
    rare = rarely(setting, space, keep) if possible and wanted else None
    for each in (found, rare):
        if each is not None:
            each.best[:FINALISTS] = play(setting, each.best[:FINALISTS])
    return Answer(found, rare)


def play(setting: Setting, finalists: list[Ranked]) -> list[Ranked]:
    """Simulate the finalists and put them in the order that contention and the course of the pipeline give."""
    units = sum(ranked.candidate.accumulate(setting) * setting.spec.layers for ranked in finalists)
    if units > PLAYED_UNITS:
        return finalists
    played = [replace(r, simulated_s=step_s(setting, r.candidate, r.axes)) for r in finalists]
    return sorted(played, key=lambda ranked: ranked.step_s)


def rarely(setting: Setting, space: Space, keep: int) -> Found | None:
    """Plans whose groups, the members of the outermost level, agree as often as costs at most a twentieth of the time.

    The steps inside a group do not depend on how often groups agree, so one search finds them and another one ranks.
    """
    try:
        found = search(setting, replace(space, sync=_sync(setting, INTERVALS[-1])), keep=1)
        if not found.best:
            return found
        inner_s = found.best[0].time.total - found.best[0].time.outer_s
        return search(setting, replace(space, sync=_least_often(setting, inner_s)), keep=keep)
    except PlanError:
        return None


def _sync(setting: Setting, inner_steps: int) -> Sync:
    fragments = max(1, min(setting.spec.layers // 3, inner_steps // 2))
    delay = least_delay(setting.cluster.levels[-1].fanout)
    return Sync(len(setting.cluster.levels) - 1, inner_steps, fragments, overlap_steps=delay, codec="e3m0")


def _least_often(setting: Setting, inner_s: float) -> Sync:
    """The shortest interval whose stalls are small beside the steps."""
    every = [_sync(setting, inner_steps) for inner_steps in INTERVALS]
    fine = [sync for sync in every if outer_round(setting, sync, inner_s).stall_per_step_s <= STALL_ALLOWED * inner_s]
    return fine[0] if fine else every[-1]
