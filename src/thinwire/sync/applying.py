"""What is made of a fragment's aggregate: the outer step, and the group's own weights mixed with what comes out."""

import torch
from torch import Tensor

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.partition.engine import Sharded
from thinwire.rounds.config import Sync
from thinwire.sync.fragment import Fragment
from thinwire.sync.outer import mix_into, outer_step


def apply_change(engine: Sharded, fragment: Fragment, change: Tensor, sync: Sync) -> None:
    """Step the outer weights and momentum with `change` (n,), which is used up, and mix. All ranks of the group together."""
    weights, momentum = fragment.take()
    rms = _rms(momentum, engine.world) if sync.gap_penalty else None
    outer_step(weights, momentum, change, sync, rms=rms)
    fragment.put(weights, momentum)
    _write(engine, fragment, weights, sync.mix)


def restart(engine: Sharded, fragment: Fragment, sync: Sync) -> None:
    """Mix with the outer weights as they are: there is nothing to apply, but what was just sent must not be sent again."""
    weights, _ = fragment.take()
    _write(engine, fragment, weights, sync.mix)


def _rms(momentum: Tensor, group: World) -> float:
    """Root mean square over the fragment, all ranks of the group together; rounded so that any cut gives the same."""
    sums = torch.tensor([momentum.double().square().sum().item(), momentum.numel()], dtype=torch.float64)
    all_reduce_small(sums, world=group, op="sum")
    squares, count = sums.tolist()
    return float(torch.tensor((squares / max(1.0, count)) ** 0.5, dtype=torch.float32))


def _write(engine: Sharded, fragment: Fragment, weights: Tensor, mix: float) -> None:
    with engine.rewriting(fragment.units):
        for share, outer in zip(fragment.shares, fragment.split(weights), strict=True):
            mix_into(share.master, outer, mix)
