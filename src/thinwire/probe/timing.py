"""Seconds of something that all ranks do at once, agreed on: the slowest rank's, of windows long enough to trust.

Ranks that share cores take turns on them for some milliseconds at a time, so a window is longer than that. An accelerator
is given work ahead of time: a window ends when all of it is done, and windows that grow up to the length of the first that
counts bring its clock rates up. Repetitions are as many as the time for one thing allows: a slow link is timed less often,
not for longer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World

WINDOW_S = 0.06
"""Least time of one repetition."""
POINT_S = 2.5
"""Most time for one thing, but for its least number of repetitions."""
LEAST_REPEATS = 3
_GROWTH = 16
"""Most times as long as the last one that the next window may be."""


@dataclass(frozen=True)
class Stopwatch:
    """How time is told, and how the device is waited for."""

    now_s: Callable[[], float]
    settle: Callable[[], None]

    @staticmethod
    def of(world: World) -> "Stopwatch":
        return Stopwatch(perf_counter, lambda: settle(world))

    def take(self, work: Callable[[], object], turns: int) -> float:
        """Seconds until `turns` times `work` are done."""
        start_s = self.now_s()
        for _ in range(turns):
            work()
        self.settle()
        return self.now_s() - start_s


def timed(
    world: World,
    repeats: int,
    work: Callable[[], object],
    *,
    window_s: float = WINDOW_S,
    watch: Stopwatch | None = None,
) -> list[float]:
    """Seconds of one `work` in each repetition, the slowest rank's; the same on all ranks."""
    watch = watch or Stopwatch.of(world)
    turns, repeats = _agree(world, repeats, work, window_s, watch)
    seconds = torch.zeros(repeats, dtype=torch.float64)
    for i in range(repeats):
        meet(world)
        seconds[i] = watch.take(work, turns) / turns
    all_reduce_small(seconds, world=world, op="max")
    return [float(each) for each in seconds]


def _agree(
    world: World, repeats: int, work: Callable[[], object], window_s: float, watch: Stopwatch
) -> tuple[int, int]:
    """(times in a window, windows), the same on all ranks: windows grow until one is half as long as it has to be."""
    watch.take(work, 1)  # the first loads libraries and chooses kernels
    turns, spent_s = 1, _slowest(world, watch.take(work, 1))
    while spent_s < window_s / 2:
        turns = min(_GROWTH * turns, max(turns + 1, int(turns * window_s / spent_s)))
        spent_s = _slowest(world, watch.take(work, turns))
    once_s = spent_s / turns
    turns = max(1, int(window_s / once_s))
    return turns, max(min(LEAST_REPEATS, repeats), min(repeats, int(POINT_S / (turns * once_s))))


def _slowest(world: World, seconds: float) -> float:
    most = torch.tensor([seconds], dtype=torch.float64)
    all_reduce_small(most, world=world, op="max")
    return max(1e-9, float(most))


def settle(world: World) -> None:
    """Wait until the accelerator is done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def meet(world: World) -> None:
    """Wait for all ranks."""
    all_reduce_small(torch.zeros(1, dtype=torch.float64), world=world)


def agreed_mean(world: World, values: torch.Tensor) -> list[float]:
    """The mean over ranks of each value."""
    all_reduce_small(values, world=world, op="sum")
    return [float(each) / world.size for each in values]
