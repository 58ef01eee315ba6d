"""Your own module in your own loop, with its states cut over two levels: four ranks on this machine.

torchrun --nproc-per-node 4 examples/mlp_loop.py
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from thinwire import Cluster, Partition, Plan, ShardedOptimizer, World, shard
from thinwire.cluster.cluster import Level
from thinwire.plan.compression import Compression

STEPS, MICRO_BATCHES = 50, 2


def main() -> None:
    cluster = Cluster(levels=(Level(name="node", fanout=2), Level(name="cluster", fanout=2)))
    world = World.from_environment(cluster, os.environ)
    plan = Plan(
        levels=(("node", 2), ("cluster", 2)),
        partition=Partition(params="node", grads="node", optimizer="cluster"),
        compression=Compression(grads={"cluster": "int8"}, weights={"cluster": "delta-int4"}),
        accumulate=MICRO_BATCHES,
    )
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    sharded = shard(model, plan, world)
    optimizer = ShardedOptimizer(sharded, lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    torch.manual_seed(1 + world.rank)  # different data on every rank
    for step in range(STEPS):
        total = 0.0
        for number in range(MICRO_BATCHES):
            x = torch.randn(32, 16)
            with sharded.micro_batch(last=number == MICRO_BATCHES - 1):
                loss = F.mse_loss(model(x), x.prod(dim=1, keepdim=True).tanh() + x[:, :1])
                loss.backward()
            total += loss.item() / MICRO_BATCHES
        sharded.finish_reduce()
        optimizer.step(grad_scale=1 / (world.size * MICRO_BATCHES))
        if world.rank == 0 and (step + 1) % 10 == 0:
            sent = world.ledger.drain().sent_bytes()
            print(f"step {step + 1}: loss {total:.4f}, bytes sent in 10 steps: {sent}")
    sharded.drain()
    world.leave()


if __name__ == "__main__":
    main()
