"""Times of what ranks say to each other: collectives by size on every level, pairs of members, and both beside compute.

What all ranks do at once takes the seconds of the slowest, in windows long enough to trust. Ranks that share cores take
turns on them for some milliseconds at a time, so a window is longer than that. An accelerator is given work ahead of time: a
window ends when all of it is done, and windows that grow up to the length of the first that counts bring its clock rates up.
Repetitions are as many as the time for one thing allows: a slow link is timed less often, not for longer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from statistics import median
from time import perf_counter

import torch

from thinwire.comm.collectives import all_gather, all_reduce_small, reduce_scatter
from thinwire.comm.handle import Handle
from thinwire.comm.world import World
from thinwire.probe.effort import Effort

# k members of a group, n numbers of one member's chunk
Samples = list[float]
Progress = Callable[[str], None]
LONGEST_S = 1.0
"""Chunks grow until one collective takes this long."""
_BESIDE_S = 0.3
"""The longest gather that computing goes on beside."""
_STRETCH_S, _MEETINGS_S = 0.01, 0.2
"""Compute between two synchronisation points, and how long ranks go on synchronising in one repetition."""
_TURNS = 2
"""Repetitions of synchronising for each of what else is timed."""
_MANY = 8
"""In larger groups only members that stand next to each other are paired."""


def messages(world: World, effort: Effort) -> Iterator[tuple[int, int]]:
    """(level, bytes of a chunk) that may be timed."""
    for level in joined(world):
        yield from ((level, chunk) for chunk in effort.chunks)


def joined(world: World) -> list[int]:
    """Levels that join more than one member."""
    return [level for level in range(len(world.cluster.levels)) if world.fanout(level) > 1]


def pairs(world: World) -> list[tuple[int, int, int]]:
    """(level, one member, another) of every level outside the innermost that joins several."""
    found = []
    for level in [level for level in joined(world) if level > 0]:
        k = world.fanout(level)
        near = [(i, (i + 1) % k) for i in range(k)] if k > _MANY else list(combinations(range(k), 2))
        found += [(level, *pair) for pair in near]
    return found


def collectives(
    world: World, effort: Effort, progress: Progress
) -> tuple[dict[tuple[int, int], Samples], dict[tuple[int, int], Samples]]:
    """(level, bytes one rank sends) -> seconds of a gather, and of a reduce-scatter."""
    gathers: dict[tuple[int, int], Samples] = {}
    reduces: dict[tuple[int, int], Samples] = {}
    full: set[int] = set()
    for level, chunk in messages(world, effort):
        progress(f"collectives over {world.level_name(level)}, {chunk} bytes")
        if level in full:
            continue
        sent = chunk * (world.fanout(level) - 1)
        gathers[level, sent] = timed(world, effort.repeats, _awaited(start_gather(world, level, chunk)))
        reduces[level, sent] = timed(world, effort.repeats, _reduce(world, level, chunk))
        if median(gathers[level, sent]) > LONGEST_S:
            full.add(level)
    return gathers, reduces


def start_gather(world: World, level: int, chunk: int) -> Callable[[], Handle]:
    """Issues an all-gather into memory that is new each time, as a training step does."""
    shard_n = torch.ones(chunk // 4, device=world.device)

    def start() -> Handle:
        out_kn = torch.empty(world.fanout(level) * shard_n.numel(), device=world.device)
        return all_gather(out_kn, shard_n, world=world, level=level, purpose="probe")

    return start


def _awaited(start: Callable[[], Handle]) -> Callable[[], float]:
    return lambda: start().wait()


def _reduce(world: World, level: int, chunk: int) -> Callable[[], None]:
    full_kn = torch.ones(world.fanout(level) * (chunk // 4), device=world.device)

    def reduce() -> None:
        out_n = torch.empty(chunk // 4, device=world.device)
        reduce_scatter(out_n, full_kn, world=world, level=level, purpose="probe").wait()

    return reduce


def exchanges(world: World, chunk: int, repeats: int, progress: Progress) -> dict[tuple[int, int, int], Samples]:
    """(level, one member, another) -> seconds in which all ranks of both exchange a chunk, all others silent."""
    found = {}
    for level, one, other in pairs(world):
        progress(f"members {one} and {other} of {world.level_name(level)}")
        found[level, one, other] = timed(world, repeats, _exchange(world, level, (one, other), chunk))
    return found


def _exchange(world: World, level: int, among: tuple[int, int], chunk: int) -> Callable[[], None]:
    """Does nothing on ranks of other members."""
    transport = world.transport(level, "gather")
    assert transport is not None
    row_n = torch.ones(chunk // 4, device=world.device)
    received_kn = torch.empty(2, chunk // 4, device=world.device)

    def exchange() -> None:
        if world.coordinate(level) in among:
            for work in transport.all_gather(received_kn, row_n, among=among):
                work.wait()

    return exchange


def beside(
    world: World, effort: Effort, gathers: Mapping[tuple[int, int], Sequence[float]], dtype: torch.dtype
) -> tuple[dict[int, Samples], Samples]:
    """(level -> share of a gather that goes on while ranks compute, slowdown of compute beside the outermost level's).

    Ranks compute for half of the gather's time between issuing and awaiting it. If nothing of it goes on meanwhile that
    lengthens it by all of the compute. Ranks that copy from each other's memory do so in the thread that awaits it, so
    there is nothing to time.
    """
    shares: dict[int, Samples] = {}
    slowdowns: Samples = []
    a = torch.rand(256, 256, device=world.device).to(dtype)
    matmul_s = median(timed(world, effort.repeats, lambda: a @ a))
    for level in joined(world):
        if world.reads_memory(level):
            shares[level], slowdowns = [0.0], [0.0]
            continue
        found = sorted((sent, median(t)) for (at, sent), t in gathers.items() if at == level)
        sent, gather_s = max([each for each in found if each[1] <= _BESIDE_S] or found[:1])
        start = start_gather(world, level, sent // (world.fanout(level) - 1))
        compute = partial(_matmuls, a, max(1, int(0.5 * gather_s / matmul_s)))
        repeats = min(effort.repeats, 5)
        shares[level] = _shares(world, repeats, start, compute)
        slowdowns = _slowdowns(world, repeats, start, compute)
    return shares, slowdowns


def _shares(world: World, repeats: int, start: Callable[[], Handle], compute: Callable[[], None]) -> Samples:
    """Share of a gather that goes on while ranks compute."""

    def both() -> None:
        handle = start()
        compute()
        handle.wait()

    alone_s = median(timed(world, repeats, compute))
    gather_s = median(timed(world, repeats, _awaited(start)))
    return [min(1.0, max(0.0, 1.0 - (second - gather_s) / alone_s)) for second in timed(world, repeats, both)]


def sync_points(world: World, effort: Effort, dtype: torch.dtype) -> Samples:
    """Seconds lost whenever ranks that copy from each other's memory meet between stretches of compute.

    That is what compute and a small gather over all such levels take together, beyond what each takes alone, timed in
    turns: it is a small difference between large figures of a machine whose speed changes. A sample may be negative.
    """
    near = [level for level in joined(world) if world.reads_memory(level)]
    if not near:
        return []
    a = torch.rand(256, 256, device=world.device).to(dtype)
    compute = partial(_matmuls, a, max(1, int(_STRETCH_S / median(timed(world, effort.repeats, lambda: a @ a)))))
    starts = [start_gather(world, level, effort.chunks[0]) for level in near]

    def meet_all() -> None:
        for start in starts:
            start().wait()

    def both() -> None:
        compute()
        meet_all()

    sync_point_s = median(timed(world, effort.repeats, meet_all))
    found: Samples = []
    for _ in range(_TURNS * effort.repeats):
        alone_s, together_s = (timed(world, 1, work, window_s=_MEETINGS_S)[0] for work in (compute, both))
        found.append(together_s - alone_s - sync_point_s)
    return found


def _matmuls(a: torch.Tensor, count: int) -> None:
    for _ in range(count):
        a @ a


def _slowdowns(world: World, repeats: int, start: Callable[[], Handle], compute: Callable[[], None]) -> Samples:
    """By how much compute is slower while the gather is under way, the mean over ranks."""
    found = torch.zeros(repeats, dtype=torch.float64)
    for i in range(repeats):
        meet(world)
        alone_s = _seconds(world, compute)
        meet(world)
        handle = start()
        found[i] = _seconds(world, compute) / alone_s - 1
        handle.wait()
        settle(world)
    return agreed_mean(world, found)


def _seconds(world: World, compute: Callable[[], None]) -> float:
    if world.device.type != "cuda":
        start_s = perf_counter()
        compute()
        return perf_counter() - start_s
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    compute()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


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
