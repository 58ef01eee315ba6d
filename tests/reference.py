"""The references of `collectives`: torch.distributed's plain calls, synchronous, not counted. For checking only."""

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.comm.world import World


def all_gather(shard_n: Tensor, *, world: World, level: int) -> Tensor:
    """Everybody's chunk in order, (k * n,)."""
    group, k = world.group(level, "small"), world.fanout(level)
    if group is None:
        return shard_n.clone()
    parts = [torch.empty_like(shard_n) for _ in range(k)]
    dist.all_gather(parts, shard_n.contiguous(), group=group)
    return torch.cat(parts)


def reduce_scatter(full_kn: Tensor, *, world: World, level: int) -> Tensor:
    """The sum of everybody's chunk for this rank, by an all-reduce of the whole: twice the bytes that are needed."""
    summed = all_reduce(full_kn, world=world, level=level)
    return summed.view(world.fanout(level), -1)[world.coordinate(level)].clone()


def all_reduce(x: Tensor, *, world: World, level: int) -> Tensor:
    """The sum over the group, by torch's all-reduce."""
    summed = x.clone()
    if (group := world.group(level, "small")) is not None:
        dist.all_reduce(summed, group=group)
    return summed
