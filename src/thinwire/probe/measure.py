"""Time what costs are made of, on all ranks at once: matmuls by shape, copies, collectives by size, and both together.

All ranks repeat everything equally often and agree on the slowest rank's seconds of each repetition, so that a level's
link is timed with all of its ranks sending, as in a training step.
"""

import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch

from thinwire.comm.collectives import all_gather, all_reduce_small, reduce_scatter
from thinwire.comm.handle import Handle
from thinwire.comm.world import World
from thinwire.probe.fit import Shape, Timings

# k members of a group, n numbers of one member's chunk


@dataclass(frozen=True)
class Effort:
    """How much is timed."""

    shapes: tuple[Shape, ...]
    copies: tuple[int, ...]
    chunks: tuple[int, ...]
    """Bytes one rank sends to each of the others."""
    repeats: int


QUICK = Effort(
    tuple((m, d, d) for m in (32, 256) for d in (64, 256)), (2**20, 2**24), (2**12, 2**16, 2**20, 2**22), repeats=5
)
FULL = Effort(
    tuple((m, d, n) for m in (32, 128, 512, 1024) for d, n in ((64, 64), (256, 256), (512, 2048), (1024, 1024))),
    (2**20, 2**22, 2**24, 2**26),
    (2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**24),
    repeats=15,
)


def measure(world: World, effort: Effort, progress: Callable[[str], None]) -> Timings:
    """Everything; `progress` is called before each part. All ranks return the same figures."""
    cuda = world.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    matmuls = {}
    for m, k, n in effort.shapes:
        progress(f"matmul {m} x {k} x {n}")
        a, b = (torch.rand(shape, device=world.device).to(dtype) for shape in ((m, k), (k, n)))
        matmuls[m, k, n] = _timed(world, effort.repeats, partial(torch.matmul, a, b), least_s=1e-3)
    copies = {}
    for size in effort.copies:
        progress(f"copy of {size} bytes")
        source = torch.ones(size // 8, device=world.device)
        out = torch.empty_like(source)
        copies[2 * source.nbytes] = _timed(world, effort.repeats, partial(out.copy_, source), least_s=1e-3)
    progress("small operations")
    one = torch.ones(8, device=world.device)
    launches = _timed(world, effort.repeats, lambda: one.add_(0.0), least_s=1e-3)
    gathers, reduces = {}, {}
    for level, chunk in _messages(world, effort):
        progress(f"collectives over {world.level_name(level)}, {chunk} bytes")
        sent = chunk * (world.fanout(level) - 1)
        gathers[level, sent] = _timed(world, effort.repeats, _gather(world, level, chunk))
        reduces[level, sent] = _timed(world, effort.repeats, _reduce(world, level, chunk))
    progress("compute beside a collective")
    slowdowns = _slowdowns(world, effort, dtype)
    agreed = torch.tensor([-_memory(world), _runtime(world)], dtype=torch.float64)
    all_reduce_small(agreed, world=world, op="max")
    return Timings(
        matmuls, copies, launches, gathers, reduces, slowdowns, -int(agreed[0].item()), int(agreed[1].item())
    )


def parts(world: World, effort: Effort) -> int:
    """How often `measure` calls `progress`."""
    return len(effort.shapes) + len(effort.copies) + 2 + len(list(_messages(world, effort)))


def _messages(world: World, effort: Effort) -> Iterator[tuple[int, int]]:
    for level in range(len(world.cluster.levels)):
        if world.fanout(level) > 1:
            yield from ((level, chunk) for chunk in effort.chunks)


def _timed(world: World, repeats: int, work: Callable[[], object], *, least_s: float = 0.0) -> list[float]:
    """Seconds of one `work`, the slowest rank's; short ones are timed many at a time so that a clock can see them."""
    turns = _turns(world, work, least_s)
    seconds = torch.zeros(repeats, dtype=torch.float64)
    for i in range(repeats):
        _meet(world)
        start_s = perf_counter()
        for _ in range(turns):
            work()
        _settle(world)
        seconds[i] = (perf_counter() - start_s) / turns
    all_reduce_small(seconds, world=world, op="max")
    return [float(each) for each in seconds]


def _turns(world: World, work: Callable[[], object], least_s: float) -> int:
    work()
    _settle(world)
    start_s = perf_counter()
    work()
    _settle(world)
    turns = torch.tensor([max(1.0, least_s // max(1e-9, perf_counter() - start_s))], dtype=torch.float64)
    all_reduce_small(turns, world=world, op="max")
    return int(turns.item())


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _meet(world: World) -> None:
    all_reduce_small(torch.zeros(1, dtype=torch.float64), world=world)


def _start_gather(world: World, level: int, chunk: int) -> Callable[[], Handle]:
    shard_n = torch.ones(chunk // 4, device=world.device)
    out_kn = torch.empty(world.fanout(level) * shard_n.numel(), device=world.device)
    return lambda: all_gather(out_kn, shard_n, world=world, level=level, purpose="probe")


def _gather(world: World, level: int, chunk: int) -> Callable[[], None]:
    start = _start_gather(world, level, chunk)
    return lambda: start().wait()


def _reduce(world: World, level: int, chunk: int) -> Callable[[], None]:
    full_kn = torch.ones(world.fanout(level) * (chunk // 4), device=world.device)
    out_n = torch.empty(chunk // 4, device=world.device)
    return lambda: reduce_scatter(out_n, full_kn, world=world, level=level, purpose="probe").wait()


def _slowdowns(world: World, effort: Effort, dtype: torch.dtype) -> list[float]:
    """By how much matmuls are slower while the outermost level's largest gather is under way; none for one rank."""
    levels = [level for level in range(len(world.cluster.levels)) if world.fanout(level) > 1]
    if not levels:
        return []
    start = _start_gather(world, levels[-1], effort.chunks[-1])
    gather_s = median(_timed(world, effort.repeats, lambda: start().wait()))
    a = torch.rand(256, 256, device=world.device).to(dtype)
    matmul_s = median(_timed(world, effort.repeats, lambda: a @ a, least_s=1e-3))
    count = max(1, int(0.5 * gather_s / matmul_s))  # compute ends before the gather does
    found = torch.zeros(effort.repeats, dtype=torch.float64)
    for i in range(effort.repeats):
        alone = _matmuls_s(world, a, count)
        _meet(world)
        handle = start()
        found[i] = _matmuls_s(world, a, count) / alone - 1
        handle.wait()
        _settle(world)
    all_reduce_small(found, world=world, op="max")
    return [float(each) for each in found]


def _matmuls_s(world: World, a: torch.Tensor, count: int) -> float:
    if world.device.type != "cuda":
        start_s = perf_counter()
        for _ in range(count):
            a @ a
        return perf_counter() - start_s
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(count):
        a @ a
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _memory(world: World) -> float:
    """Bytes a rank has: its accelerator's, or its part of this machine's if the innermost level lies on it."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world.cluster.levels[0].fanout


def _runtime(world: World) -> float:
    """Bytes of the runtime: reserved and not allocated on an accelerator, the process's own on a CPU."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        return float(total - free - torch.cuda.memory_allocated(world.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
