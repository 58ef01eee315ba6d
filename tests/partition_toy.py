"""A small module with every unusual kind of parameter in it, and its training, for tests of the engine."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicated import Replicated
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from thinwire.plan.partition import Partition
from thinwire.plan.plan import Plan

STEPS = 3


class Toy(nn.Module):
    """Blocks of odd sizes, a tied head, an unused and a frozen parameter, one smaller than the world."""

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 13), nn.Identity() if exact else nn.GELU(), nn.Linear(13, 6)) for _ in range(3)
        )
        self.norm = nn.Identity() if exact else nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        if exact:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(torch.randint(-1, 2, parameter.shape).float())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)) * self.scale * self.frozen.sum()


def plan_of(world: World, cut: tuple[int, int, int], accumulate: int = 1, **more: Any) -> Plan:
    """Every unit by itself, as large ones are, unless `bucket_bytes` says otherwise."""
    more.setdefault("bucket_bytes", 0)
    names = world.cluster.level_names
    params, grads, optimizer = ("replica" if depth < 0 else names[depth] for depth in cut)
    levels = tuple((level.name, level.fanout) for level in world.cluster.levels)
    keep = more.pop("keep_gathered", False)
    partition = Partition(params=params, grads=grads, optimizer=optimizer, keep_gathered=keep)
    return Plan(levels=levels, partition=partition, accumulate=accumulate, **more)


def adamw(engine: Sharded | Replicated) -> ShardedOptimizer:
    def group_of(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"weight_decay": 0.1 if len(shape) >= 2 else 0.0}

    return ShardedOptimizer(engine, lambda groups: torch.optim.AdamW(groups, lr=1e-2), group_of=group_of)


def batches(world: World, step: int, accumulate: int) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(accumulate):
        generator = torch.Generator().manual_seed(1000 * step + 10 * world.rank + number)
        yield torch.randint(0, 11, (4, 5), generator=generator), torch.randint(0, 11, (4, 5), generator=generator)


def train(engine: Sharded | Replicated, world: World, accumulate: int, steps: int = STEPS) -> list[tuple[float, float]]:
    """(sum of this rank's losses, global gradient norm) per step."""
    optimizer, seen = adamw(engine), []
    for step in range(steps):
        total = 0.0
        pairs = list(batches(world, step, accumulate))
        for number, (tokens, targets) in enumerate(pairs):
            with engine.micro_batch(last=number == len(pairs) - 1):
                loss = F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum")
                loss.backward()
            total += loss.item()
        engine.finish_reduce()
        seen.append((total, engine.grad_norm()))
        optimizer.step(grad_scale=1 / (world.size * accumulate * 20))
    engine.drain()
    return seen


def weights(engine: Sharded | Replicated) -> bytes:
    """A hash of the module's whole weights as this rank computes with them."""
    digest = hashlib.sha256()
    if isinstance(engine, Sharded):
        with engine.full_parameters():
            for parameter in engine.module.parameters():
                digest.update(parameter.detach().float().numpy().tobytes())
    else:
        for parameter in engine.module.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    return digest.digest()


def one_step(engine: Sharded, optimizer: ShardedOptimizer, world: World, step: int) -> tuple[float, float, bytes]:
    tokens, targets = next(batches(world, step, 1))
    with engine.micro_batch(last=True):
        loss = F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum")
        loss.backward()
    engine.finish_reduce()
    norm = engine.grad_norm()
    optimizer.step(grad_scale=0.01)
    engine.drain()
    return loss.item(), norm, weights(engine)
