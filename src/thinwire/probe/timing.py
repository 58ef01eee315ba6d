"""Seconds of something that all ranks do at once, agreed on: the slowest rank's, of windows long enough to trust.

Ranks that share cores take turns on them for some milliseconds at a time, so a window is longer than that. Repetitions
are as many as the time for one thing allows: a slow link is timed less often, not for longer.
"""

from collections.abc import Callable
from time import perf_counter

import torch

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World

WINDOW_S = 0.06
"""Least time of one repetition."""
POINT_S = 2.5
"""Most time for one thing, but for its least number of repetitions."""
LEAST_REPEATS = 3


def timed(world: World, repeats: int, work: Callable[[], object], *, window_s: float = WINDOW_S) -> list[float]:
    """Seconds of one `work` in each repetition, the slowest rank's; the same on all ranks."""
    turns, repeats = _agree(world, repeats, work, window_s)
    seconds = torch.zeros(repeats, dtype=torch.float64)
    for i in range(repeats):
        meet(world)
        start_s = perf_counter()
        for _ in range(turns):
            work()
        settle(world)
        seconds[i] = (perf_counter() - start_s) / turns
    all_reduce_small(seconds, world=world, op="max")
    return [float(each) for each in seconds]


def _agree(world: World, repeats: int, work: Callable[[], object], window_s: float) -> tuple[int, int]:
    """(times in a window, windows), the same on all ranks."""
    work()
    settle(world)
    start_s = perf_counter()
    work()
    settle(world)
    once = torch.tensor([perf_counter() - start_s], dtype=torch.float64)
    all_reduce_small(once, world=world, op="max")
    once_s = max(1e-9, float(once))
    turns = max(1, int(window_s / once_s))
    return turns, max(min(LEAST_REPEATS, repeats), min(repeats, int(POINT_S / (turns * once_s))))


def settle(world: World) -> None:
    """Wait until the accelerator is done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def meet(world: World) -> None:
    """Wait for all ranks."""
    all_reduce_small(torch.zeros(1, dtype=torch.float64), world=world)


def agreed_mean(world: World, values: torch.Tensor) -> list[float]:
    """The mean over ranks of each value."""
    all_reduce_small(values, world=world, op="sum")
    return [float(each) / world.size for each in values]
