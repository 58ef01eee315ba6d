"""Time what costs are made of, on all ranks at once: what a rank computes, collectives by size, and both together.

Timings that cannot be the machine's are refused before anything is fitted to them. All ranks repeat everything equally often
and agree on the slowest rank's seconds of each repetition, so that a level's link is timed with all of its ranks sending, as
in a training step.
"""

import math
import os
import resource
from collections.abc import Callable, Iterator
from statistics import median

import torch

from thinwire.cluster.cluster import Cluster
from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.errors import ProbeError
from thinwire.probe import compute, links
from thinwire.probe.effort import Effort, Shape
from thinwire.probe.fit import Samples, Timings
from thinwire.units import show_count, show_seconds

_LEAST_LAUNCHES = 20
"""Launches that an accelerator's largest product has to be worth: else launching is what was timed."""
_LEAST, _MOST = 0.05, 1.15
"""Of the maker's figures. A busy or throttled device falls short of them; nothing exceeds them but a clock that is wrong."""


def check(given: Cluster, timings: Timings) -> None:
    """Raise ProbeError if a time is none, the largest product is a launch, or a rate is far from the device's figures."""
    for what, samples in _all(timings):
        if not all(math.isfinite(second) and second > 0 for second in samples):
            raise ProbeError(f"{what} took {samples[0]} s: the clock cannot be trusted, and nothing was written")
    shape, product_s = largest_product(timings)
    launch_s, device = median(timings.launches), given.device
    if device.kind != "cpu" and product_s < _LEAST_LAUNCHES * launch_s:
        raise ProbeError(
            f"the largest product, {_shown(shape)}, took {show_seconds(product_s)}, and an operation on nothing "
            f"{show_seconds(launch_s)}: launching was timed, not the device; nothing was written. Probe without --quick"
        )
    size = max(timings.copies)
    _compare(f"the product {_shown(shape)}", flops(shape) / product_s, device.peak_flops_per_s, "FLOP/s", device.name)
    _compare(
        f"a copy of {size} bytes", size / median(timings.copies[size]), device.memory_bytes_per_s, "B/s", device.name
    )


def largest_product(timings: Timings) -> tuple[Shape, float]:
    """(shape, seconds in the median) of the product with most operations."""
    shape = max(timings.matmuls, key=flops)
    return shape, median(timings.matmuls[shape])


def flops(shape: Shape) -> float:
    """Operations of a product: 2 m k n."""
    return 2.0 * shape[0] * shape[1] * shape[2]


def _all(timings: Timings) -> Iterator[tuple[str, Samples]]:
    yield from ((f"the product {_shown(shape)}", samples) for shape, samples in timings.matmuls.items())
    yield from ((f"a copy of {size} bytes", samples) for size, samples in timings.copies.items())
    yield "an operation on eight numbers", timings.launches
    for kind, of_kind in (("an all-gather", timings.gathers), ("a reduce-scatter", timings.reduces)):
        yield from ((f"{kind} of {size} bytes", samples) for (_, size), samples in of_kind.items())


def _compare(what: str, rate: float, stated: float | None, unit: str, device: str) -> None:
    if stated is None or _LEAST * stated <= rate <= _MOST * stated:
        return
    cause = "something else uses it, or it is not that device" if rate < stated else "it is not that device"
    raise ProbeError(
        f"{what} ran at {show_count(rate)}{unit}, {100 * rate / stated:.3g} % of what {device} is stated to do "
        f"({show_count(stated)}{unit}): {cause}; nothing was written. `nvidia-smi` shows who uses it, --device names another"
    )


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape))


_PAIR_BYTES = 2**18


def measure(world: World, effort: Effort, progress: Callable[[str], None]) -> Timings:
    """Everything; `progress` is called before each part. All ranks return the same figures, or raise the same ProbeError."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    agreed = torch.tensor([-_memory(world), _runtime(world)], dtype=torch.float64)
    all_reduce_small(agreed, world=world, op="max")
    matmuls = compute.matmuls(world, effort, dtype, progress)
    copies = compute.copies(world, effort, progress)
    blocks = compute.blocks(world, effort, dtype, progress)
    coding = compute.coding(world, effort, progress)
    progress("small operations, loss, optimizer")
    single = compute.launches(world, effort), compute.loss(world, effort, dtype)
    updates = compute.optimizer(world, effort), compute.collect(world, effort)
    gathers, reduces = links.collectives(world, effort, progress)
    exchanges = links.exchanges(world, min(_PAIR_BYTES, effort.chunks[-1]), effort.repeats, progress)
    progress("compute beside a collective")
    behind, slowdowns = links.beside(world, effort, gathers, dtype)
    sync_points = links.sync_points(world, effort, dtype)
    timings = Timings(
        matmuls=matmuls, copies=copies, launches=single[0], gathers=gathers, reduces=reduces, slowdowns=slowdowns,
        memory_bytes=-int(agreed[0].item()), runtime_bytes=int(agreed[1].item()), blocks=blocks, logit=single[1],
        update=updates[0], collect=updates[1], coding=coding, behind=behind, exchanges=exchanges, sync_points=sync_points,
    )  # fmt: skip
    check(world.cluster, timings)
    return timings


def parts(world: World, effort: Effort) -> int:
    """How often `measure` calls `progress`."""
    computed = len(effort.shapes) + len(effort.copies) + len(effort.blocks) + len(effort.codecs)
    return computed + 2 + len(list(links.messages(world, effort))) + len(links.pairs(world))


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
