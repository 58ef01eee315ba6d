"""What is made of a fragment's aggregate: the outer step, and the group's own weights mixed with what comes out."""

import torch
from torch import Tensor

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.partition.engine import Sharded
from thinwire.rounds.config import Sync
from thinwire.sync.fragment import Fragment
from thinwire.sync.outer import mix_into, outer_step

_CPU_CHUNK = 1 << 17
"""Elements at a time: what the step makes of them is in the processor's cache when they are mixed."""


def apply_change(engine: Sharded, fragment: Fragment, change: Tensor, sync: Sync) -> None:
    """Step the outer weights and momentum with `change` (n,), which is used up, and mix. All ranks of the group together."""
    weights, momentum = fragment.take()
    rms = _rms(momentum, engine.world) if sync.gap_penalty else None
    at_a_time = _CPU_CHUNK if weights.device.type == "cpu" else max(1, weights.numel())
    split = [fragment.split(values) for values in (weights, momentum, change)]
    with engine.rewriting(fragment.units):
        for share, *outer in zip(fragment.shares, *split, strict=True):
            chunks = [torch.split(values, at_a_time) for values in (share.master, *outer)]
            for local_c, weights_c, momentum_c, change_c in zip(*chunks, strict=True):
                outer_step(weights_c, momentum_c, change_c, sync, rms=rms)
                mix_into(local_c, weights_c, sync.mix)
    fragment.put(weights, momentum)


def restart(engine: Sharded, fragment: Fragment, sync: Sync) -> None:
    """Mix with the outer weights as they are: there is nothing to apply, but what was just sent must not be sent again."""
    weights, _ = fragment.take()
    with engine.rewriting(fragment.units):
        for share, outer in zip(fragment.shares, fragment.split(weights), strict=True):
            mix_into(share.master, outer, sync.mix)


def _rms(momentum: Tensor, group: World) -> float:
    """Root mean square over the fragment, all ranks of the group together; rounded so that any cut gives the same."""
    sums = torch.tensor([momentum.double().square().sum().item(), momentum.numel()], dtype=torch.float64)
    all_reduce_small(sums, world=group, op="sum")
    squares, count = sums.tolist()
    return float(torch.tensor((squares / max(1.0, count)) ** 0.5, dtype=torch.float32))
