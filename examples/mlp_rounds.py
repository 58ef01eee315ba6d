"""Two worker groups that agree every ten steps, in your own loop.

torchrun --nproc-per-node 2 examples/mlp_rounds.py
"""

import os

import torch
from torch import nn

from thinwire import Cluster, OuterSync, PlanConfig, ShardedOptimizer, SyncConfig, World, shard
from thinwire.cluster.cluster import Level

STEPS = 60


def main() -> None:
    """Train a small regression; every group sees its own data."""
    cluster = Cluster(levels=(Level(name="site", fanout=2),))
    plan = PlanConfig(partition="ddp", sync=SyncConfig(kind="diloco", inner_steps=10)).resolve(
        cluster, micro_batch=32, accumulate=1
    )
    world = World.from_environment(cluster, os.environ)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    target = torch.randn(16, generator=torch.Generator().manual_seed(1))
    sharded = shard(model, plan.of_group(), world.inside(plan.levels_in_group))
    optimizer = ShardedOptimizer(sharded, lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    assert plan.sync is not None
    sync = OuterSync(sharded, plan.sync, world)
    draw = torch.Generator().manual_seed(100 + world.rank)
    for step in range(1, STEPS + 1):
        x = torch.randn(32, 16, generator=draw)
        with sharded.micro_batch(last=True):
            loss = (sharded.module(x).squeeze(1) - x @ target).square().mean()
            loss.backward()
        sharded.finish_reduce()
        optimizer.step()
        for done in sync.after(step):
            if world.rank == 0:
                print(f"step {done.apply}: round {done.round} applied, group 0 has loss {loss.item():.4f}")
    sync.settle()
    with sync.outer_weights():
        x = torch.randn(256, 16, generator=torch.Generator().manual_seed(7))
        error = (sharded.module(x).squeeze(1) - x @ target).square().mean().item()
    if world.rank == 0:
        print(f"outer weights, all groups: {error:.4f}")
    world.leave()


if __name__ == "__main__":
    main()
