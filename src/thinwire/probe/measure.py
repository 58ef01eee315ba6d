"""Time what costs are made of, on all ranks at once: what a rank computes, collectives by size, and both together.

All ranks repeat everything equally often and agree on the slowest rank's seconds of each repetition, so that a level's
link is timed with all of its ranks sending, as in a training step.
"""

import os
import resource
from collections.abc import Callable

import torch

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.probe import compute, links
from thinwire.probe.effort import Effort
from thinwire.probe.fit import Timings
from thinwire.probe.sane import check

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
    meetings = links.meetings(world, effort, dtype)
    timings = Timings(
        matmuls=matmuls, copies=copies, launches=single[0], gathers=gathers, reduces=reduces, slowdowns=slowdowns,
        memory_bytes=-int(agreed[0].item()), runtime_bytes=int(agreed[1].item()), blocks=blocks, logit=single[1],
        update=updates[0], collect=updates[1], coding=coding, behind=behind, exchanges=exchanges, meetings=meetings,
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
