"""What the engine itself takes for a small unit: a stack of blocks of width 64 on one rank, and on two of this machine.

On one rank nothing is sent. The engine's step less that of the bare module, with the same optimizer, is what a unit costs.
On two ranks over sockets of the loopback, and reading each other's memory, the sides are thinwire with every unit by
itself (`bucket_bytes` 0), with the size that it takes by itself, and with others that are asked for (`--buckets`); torch's
DDP with its default buckets; FSDP2. All train the same blocks on the same batches, all in one run, in turns.

Of thinwire's sides over sockets under one plan the slope of a step's seconds over its messages is what one message costs
beside its bytes, which all of them send alike (`plan/hops.py: _START_S`).

    OMP_NUM_THREADS=1 python benchmarks/unit_cost.py
    OMP_NUM_THREADS=1 python benchmarks/unit_cost.py --ranks 2 --buckets 262144 1048576 4194304
"""

import argparse
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from thinwire import Cluster, ShardedOptimizer, World, shard
from thinwire.cluster.cluster import Level
from thinwire.comm.device import keep_heap
from thinwire.plan.plan import PlanConfig
from thinwire.train.launch import free_port

WIDTH, SEQUENCES = 64, 16
Act = Callable[[], None]
Side = tuple[Act, Act]
"""A step, and what lands what it has left in flight."""
BARE, DDP, FSDP = "bare module", "torch DDP", "FSDP2"


class Block(nn.Module):
    """A residual MLP of six parameters, 33,216 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def batch_of(rank: int) -> Tensor:
    return torch.randn(SEQUENCES, WIDTH, generator=torch.Generator().manual_seed(rank))


def torch_side(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Side:
    optimizer = optimizer or optimizer_of(model.parameters())

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


def thinwire_side(blocks: int, world: World, partition: str, bucket_bytes: int | None, x: Tensor) -> Side:
    config = PlanConfig(partition=partition, bucket_bytes=bucket_bytes)
    plan = config.resolve(world.cluster, micro_batch=1, accumulate=1)
    engine = shard(Stack(blocks), plan, world)
    optimizer = ShardedOptimizer(engine, optimizer_of)

    def step() -> None:
        with engine.micro_batch(last=True):
            (engine.module(x).square().mean() / world.size).backward()
        engine.finish_reduce()
        optimizer.step()

    return step, engine.drain


def timed(side: Side, steps: int, world: World) -> tuple[float, float]:
    """(seconds, messages that carry states) a step, after everybody is ready.

    Of a rank alone the seconds are those of its processor, which other processes of the machine change least.
    """
    now = time.process_time if world.size == 1 else time.perf_counter
    world.ledger.drain()
    if world.size > 1:
        dist.barrier()
    start_s = now()
    step, land = side
    for _ in range(steps):
        step()
    land()
    if world.size > 1:
        dist.barrier()
    took_s = now() - start_s
    messages = sum(entry.purpose != "control" for entry in world.ledger.drain().entries)
    return took_s / steps, messages / steps


def sides_of(world: World, options: argparse.Namespace) -> dict[str, Side]:
    blocks, x = options.blocks, batch_of(world.rank)
    sides: dict[str, Side] = {BARE: torch_side(Stack(blocks), x)}
    if world.size == 1:
        return sides | {f"thinwire {plan}": thinwire_side(blocks, world, plan, None, x) for plan in options.plans}
    sizes = {"by itself": 0, "buckets": None, **{f"{size / 2**20:g} MiB": size for size in options.buckets}}
    ways = {"sockets": world.through_sockets([0]), "same host": world}
    for plan in options.plans:
        for way, ranks in ways.items():
            for name, size in sizes.items():
                sides[f"thinwire {plan}, {way}, {name}"] = thinwire_side(blocks, ranks, plan, size, x)
    sides[DDP] = torch_side(nn.parallel.DistributedDataParallel(Stack(blocks)), x)
    if options.fsdp:
        model: Any = Stack(blocks)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        sides[FSDP] = torch_side(model, x, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return sides


def rank_main(rank: int, port: int, options: argparse.Namespace, out: Any) -> None:
    keep_heap()
    torch.set_num_threads(1)
    cluster = Cluster(levels=(Level(name="host", fanout=options.ranks),))
    world = World.join(cluster, rank=rank, size=options.ranks, local_rank=rank, host="127.0.0.1", port=port)
    sides = sides_of(world, options)
    for side in sides.values():
        timed(side, 3, world)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(timed(sides[name], options.steps, world))
    world.leave()
    if rank == 0:
        out.put(rounds)


def message_s(rounds: Mapping[str, Sequence[tuple[float, float]]], plan: str) -> float | None:
    """Slope of seconds over messages, least squares over the medians of the plan's sides over sockets."""
    found = [
        tuple(map(statistics.median, zip(*seen, strict=True)))
        for name, seen in rounds.items()
        if name.startswith(f"thinwire {plan}, sockets")
    ]
    seconds, messages = zip(*found, strict=True)
    return statistics.linear_regression(messages, seconds).slope if len(set(messages)) > 1 else None


def table_of(rounds: Mapping[str, Sequence[tuple[float, float]]], options: argparse.Namespace) -> Table:
    base = BARE if options.ranks == 1 else DDP
    table = Table("side", "ms a block", f"of {base}'s", "more than bare, ms", "messages a step")
    for name, seen in rounds.items():
        ratios = [mine / theirs for (mine, _), (theirs, _) in zip(seen, rounds[base], strict=True)]
        more = [mine - bare for (mine, _), (bare, _) in zip(seen, rounds[BARE], strict=True)]
        seconds, messages = map(statistics.median, zip(*seen, strict=True))
        table.add_row(
            name,
            f"{seconds / options.blocks * 1e3:.3f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{statistics.median(more) / options.blocks * 1e3:.3f}",
            f"{messages:.0f}" if name.startswith("thinwire") else "",
        )
    return table


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    arguments.add_argument("--blocks", type=int, default=96)
    arguments.add_argument("--plans", nargs="+", default=["zero1", "zero3"])
    arguments.add_argument("--buckets", type=int, nargs="*", default=[], help="further bucket sizes, in bytes")
    arguments.add_argument("--fsdp", action="store_true", help="FSDP2 too, which takes many times longer")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--steps", type=int, default=5, help="steps of one side in a round")
    options = arguments.parse_args()
    context = mp.get_context("spawn")
    out, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=rank_main, args=(rank, port, options, out), daemon=True) for rank in range(options.ranks)
    ]
    for process in ranks:
        process.start()
    while out.empty():
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed; its last words are above")
        time.sleep(0.1)
    rounds = out.get()
    for process in ranks:
        process.join()
    console = Console(width=120)
    console.print(table_of(rounds, options))
    for plan in options.plans if options.ranks > 1 else ():
        slope_s = message_s(rounds, plan)
        if slope_s is not None:
            console.print(f"{plan}: a message over sockets costs {slope_s * 1e3:.2f} ms beside its bytes")


if __name__ == "__main__":
    main()
