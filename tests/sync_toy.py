"""Worker groups on a toy problem, for tests of outer synchronisation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.world import World
from thinwire.errors import SyncError
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from thinwire.plan.partition import Partition
from thinwire.plan.plan import Plan
from thinwire.plan.rounds import Exchange
from thinwire.plan.sync import SyncConfig
from thinwire.sync.outer_sync import OuterSync
from worlds import cluster_of

WIDTH = 12
SITES = [("site", 2)]
"""Two groups of one rank."""


class Stack(nn.Module):
    """Four blocks of 13 x 12 numbers and a head, none of them a multiple of anything."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 13), nn.Tanh(), nn.Linear(13, WIDTH)) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Group:
    """One rank of one group: the engine, its optimizer, and the outer synchronisation."""

    def __init__(
        self,
        world: World,
        sync: dict[str, Any],
        *,
        cut: tuple[str, str, str] = ("replica", "replica", "replica"),
        groups: Sequence[Sequence[int]] | None = None,
        build: Callable[[Any], torch.optim.Optimizer] | None = None,
        module: nn.Module | None = None,
        same: dict[str, str] | None = None,
        compression: dict[str, Any] | None = None,
    ) -> None:
        self.world = world
        if groups is None:
            resolved = SyncConfig.model_validate(sync).resolve([(lv.name, lv.fanout) for lv in world.cluster.levels])
            inner = world.inside(world.cluster.index(resolved.level))
        else:
            resolved = SyncConfig.model_validate(sync).resolve([("site", len(groups))])
            ranks = next(ranks for ranks in groups if world.rank in ranks)
            inner = world.among(ranks, cluster_of([len(ranks)]))
        self.inner = inner
        levels = tuple((level.name, level.fanout) for level in inner.cluster.levels)
        partition = Partition(params=cut[0], grads=cut[1], optimizer=cut[2])
        plan = Plan.model_validate({"levels": levels, "partition": partition, "compression": compression or {}})
        self.engine: Sharded = shard(module or Stack(), plan, inner)
        self.optimizer = ShardedOptimizer(self.engine, build or (lambda g: torch.optim.AdamW(g, lr=1e-2)))
        self.sync = OuterSync(self.engine, resolved, world, groups=groups, same=same)

    def train(
        self, steps: int, *, batch: Callable[[int, int], Tensor] | None = None, tokens: float = 1.0
    ) -> list[float]:
        """Losses of this rank; `batch(step, rank)` gives the input, of which the square of the output is the loss."""
        batch = batch or draw
        losses = []
        for step in range(self.sync.step, self.sync.step + steps):
            with self.engine.micro_batch(last=True):
                loss = self.engine.module(batch(step, self.world.rank)).square().mean()
                loss.backward()
            self.engine.finish_reduce()
            self.optimizer.step(grad_scale=1 / self.inner.size)
            self.sync.after(step + 1, tokens=tokens)
            losses.append(loss.item())
        self.engine.drain()
        return losses

    def local(self) -> Tensor:
        """All weights of this group, one vector."""
        with self.engine.full_parameters():
            return torch.cat([p.detach().flatten().clone() for p in self.engine.module.parameters()])

    def outer(self) -> Tensor:
        """All outer weights, one vector."""
        with self.sync.outer_weights():
            return self.local()

    def changes(self) -> list[Tensor]:
        """Filled with this rank's change of every exchange from now on, as it is sent."""
        sent: list[Tensor] = []
        plain = self.sync._send

        def send(key: Exchange) -> None:
            sent.append(self.sync.fragments[key.fragment].change().clone())
            plain(key)

        self.sync._send = send  # type: ignore[method-assign]
        return sent

    def state(self) -> list[int]:
        from thinwire.sync.peers import digest

        return [digest([f.weights, f.momentum]) for f in self.sync.fragments]


def diverging(group: Group, rank: int) -> str:
    """Of 14 steps; after four of them `rank` alters its outer state, between a send and an apply: what its group is told."""
    group.train(4)
    if group.world.rank == rank:
        group.sync.fragments[0].momentum[3] += 1e-7
    try:
        group.train(10)
    except SyncError as error:
        return str(error)
    return ""


def draw(step: int, rank: int) -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))


def alike(step: int, rank: int) -> Tensor:
    """The same data everywhere."""
    return draw(step, 0)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD(groups, lr=lr)
