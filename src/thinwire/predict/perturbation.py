"""What does not go as computed: slow ranks, jitter, slow links; and failures over a long run. All from a seed.

Failures decide the best checkpoint interval and the share of time that is progress (goodput). Young 1974 and Daly 2006: with
checkpoints that cost delta and a mean time between failures M, the best interval is sqrt(2 delta M), and the share of time
lost is delta / interval + interval / (2 M) + restart / M.
"""

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from thinwire.errors import PlanError
from thinwire.units import show_seconds


@dataclass(frozen=True)
class Failures:
    """How often a rank fails, and what stopping costs."""

    rank_mtbf_s: float
    """Mean time between failures of one rank and its share of the node."""
    checkpoint_s: float
    restart_s: float


@dataclass(frozen=True)
class Goodput:
    """The best interval between checkpoints, and what is left of the time."""

    mtbf_s: float
    interval_s: float
    share: float


def goodput(failures: Failures, ranks: int, *, islands: int = 1) -> Goodput:
    """Goodput of `ranks` ranks in `islands` groups that fail apart: a failure stops one island, not all of them."""
    mtbf = failures.rank_mtbf_s / (ranks / islands)
    interval = max(failures.checkpoint_s, math.sqrt(2 * failures.checkpoint_s * mtbf))
    lost = failures.checkpoint_s / interval + interval / (2 * mtbf) + failures.restart_s / mtbf
    return Goodput(failures.rank_mtbf_s / ranks, interval, max(0.0, 1.0 - lost))


_TRIED = 7.0
"""Mean times between failures from one checkpoint to the next at most: a thousand tries."""


@dataclass(frozen=True)
class Perturbation:
    """Everything is as computed by default."""

    slow_ranks: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """(replica, stage) -> how many times longer its compute takes."""
    slow_levels: Mapping[int, float] = field(default_factory=dict)
    """level -> how many times longer its messages take."""
    jitter: float = 0.0
    """Spread of compute times: the standard deviation of their logarithm."""
    seed: int = 0


class Jitter:
    """Factors of compute time. One simulated rank stands for `many` alike: it gets the slowest one's draw."""

    def __init__(self, perturbation: Perturbation, rank: int, many: int) -> None:
        self._random = random.Random(f"{perturbation.seed}:{rank}")
        self._spread, self._many = perturbation.jitter, many

    def factor(self) -> float:
        if self._spread == 0:
            return 1.0
        share = min(max(self._random.random(), 1e-12), 1 - 1e-12) ** (1 / self._many)
        return float(pow(2.718281828459045, self._spread * NormalDist().inv_cdf(min(share, 1 - 1e-15))))


@dataclass(frozen=True)
class LongRun:
    """A long run with failures."""

    wall_s: float
    failures: int
    useful_s: float

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s


def run_with_failures(
    step_s: float, steps: int, failures: Failures, ranks: int, *, interval_s: float | None = None, seed: int = 0
) -> LongRun:
    """Simulate `steps` steps with checkpoints and failures: what was done since the last checkpoint is done again.

    `interval_s` is the time between checkpoints; the default is the best of `goodput`. Raises PlanError where failures come
    so often that hardly any checkpoint is ever reached.
    """
    rng = random.Random(seed)
    best = goodput(failures, ranks)
    every = max(1, round((interval_s or best.interval_s) / step_s))
    now, done, saved, failed = 0.0, 0, 0, 0
    _refuse_endless(min(every, steps) * step_s + failures.checkpoint_s, best.mtbf_s, ranks)
    fails_at = rng.expovariate(1 / best.mtbf_s)
    while done < steps:
        target = min(saved + every, steps)
        end = now + (target - done) * step_s + failures.checkpoint_s
        if fails_at < end:
            failed += 1
            now = fails_at + failures.restart_s
            fails_at = now + rng.expovariate(1 / best.mtbf_s)
            done = saved
        else:
            now, done, saved = end, target, target
    return LongRun(now, failed, steps * step_s)


def _refuse_endless(reach_s: float, mtbf_s: float, ranks: int) -> None:
    """`reach_s` from one checkpoint to the next are got over once in exp(reach / MTBF) tries."""
    if reach_s > _TRIED * mtbf_s:
        raise PlanError(
            f"with a failure every {show_seconds(mtbf_s)} hardly any checkpoint is reached, the next one being "
            f"{show_seconds(reach_s)} away; {ranks} ranks get there with {reach_s * ranks / _TRIED / 3600:.3g} hours "
            f"between failures of one rank, or more"
        )


def default_failures(rank_mtbf_s: float) -> Failures:
    """Checkpoints of 30 s and restarts of 5 minutes, where nothing is known of them."""
    return Failures(rank_mtbf_s, checkpoint_s=30.0, restart_s=300.0)


def __getattr__(name: str) -> Any:
    if name != "Trouble":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("Trouble is Perturbation now; the old name works for one more release", FutureWarning, stacklevel=2)
    return Perturbation
