"""What failures cost: the best checkpoint interval and the share of time that is progress (goodput).

Young 1974 and Daly 2006: with checkpoints that cost delta and a mean time between failures M, the best interval is
sqrt(2 delta M), and the share of time lost is delta / interval + interval / (2 M) + restart / M.
"""

import math
from dataclasses import dataclass


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
