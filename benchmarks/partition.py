"""steps/s and bytes of the engine's settings against torch's DDP, FSDP2 and FSDP2-HSDP, alternating in one run.

Two nodes of two ranks on loopback (so: no slow link), the same model, batch, AdamW and accumulation for all. HSDP's
all-reduce is deferred to the last micro-batch, the fair baseline. Bytes are what the kernel counted on loopback per step
over all ranks, for everybody alike (acknowledgements and headers included).

    OMP_NUM_THREADS=1 python benchmarks/partition.py
"""

import argparse
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thinwire import Cluster, Plan, ShardedOptimizer, World, shard
from thinwire.cluster.cluster import Level
from thinwire.model.presets import preset
from thinwire.model.transformer import Transformer
from thinwire.plan import PlanConfig
from thinwire.train.launch import free_port

RANKS, ACCUMULATE, SEQUENCES, TOKENS = 4, 2, 4, 256
CLUSTER = Cluster(levels=(Level(name="node", fanout=2), Level(name="cluster", fanout=2)))
WIRES: dict[str, dict[str, Any]] = {
    "ddp": {"partition": "ddp"},
    "zero3": {"partition": "zero3"},
    "hsdp": {"partition": "hsdp"},
    "auto": {"partition": "auto"},
    "auto, kept": {"partition": "auto", "keep_gathered": True},
    "auto+int8": {"partition": "auto", "wire": {"weights": {"cluster": "int8"}, "grads": {"cluster": "int8"}}},
    "auto+int4": {"partition": "auto", "wire": {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "int4"}}},
}
PEERS = ("torch DDP", "FSDP2", "FSDP2-HSDP")
Step = Callable[[], None]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def fresh(name: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(preset(name))


def ours(name: str, model: str, world: World, batches: list[Tensor]) -> Step:
    plan: Plan = PlanConfig.model_validate(WIRES[name]).resolve(CLUSTER, micro_batch=SEQUENCES, accumulate=ACCUMULATE)
    sharded = shard(fresh(model), plan, world)
    optimizer = ShardedOptimizer(sharded, lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True))

    def step() -> None:
        for number, tokens in enumerate(batches):
            with sharded.micro_batch(last=number == ACCUMULATE - 1):
                loss_of(sharded.module, tokens).backward()
        sharded.finish_reduce()
        optimizer.step(grad_scale=1 / (RANKS * ACCUMULATE))
        world.ledger.drain()

    step.finish = sharded.drain  # type: ignore[attr-defined]
    return step


def peer(name: str, model_name: str, batches: list[Tensor]) -> Step:
    model: Any = fresh(model_name)
    if name == "torch DDP":
        model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=4)
    else:
        hybrid = name == "FSDP2-HSDP"
        shape, names = ((2, 2), ("replicate", "shard")) if hybrid else ((RANKS,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=name == "torch DDP")

    def step() -> None:
        for number, tokens in enumerate(batches):
            last = number == ACCUMULATE - 1
            if name == "FSDP2-HSDP":
                model.set_requires_all_reduce(last)
            if name == "torch DDP":
                model.require_backward_grad_sync = last
            (loss_of(model, tokens) / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def timed(step: Step, steps: int) -> tuple[float, float]:
    """(seconds per step, loopback bytes per step), after everybody is ready."""
    dist.barrier()
    before, start_s = loopback_bytes(), time.perf_counter()
    for _ in range(steps):
        step()
    getattr(step, "finish", lambda: None)()
    dist.barrier()
    return (time.perf_counter() - start_s) / steps, (loopback_bytes() - before) / steps


def rank_main(rank: int, port: int, options: argparse.Namespace, out: Any) -> None:
    torch.set_num_threads(1)
    world = World.join(CLUSTER, rank=rank, size=RANKS, local_rank=rank, host="127.0.0.1", port=port)
    draw = torch.Generator().manual_seed(rank)
    vocab = preset(options.model).vocab_size
    batches = [torch.randint(0, vocab, (SEQUENCES, TOKENS + 1), generator=draw) for _ in range(ACCUMULATE)]
    sides = {name: ours(name, options.model, world, batches) for name in WIRES}
    sides |= {name: peer(name, options.model, batches) for name in PEERS}
    for step in sides.values():
        timed(step, 2)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(timed(sides[name], options.steps))
    world.leave()
    if rank == 0:
        out.put(rounds)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=4, help="steps of one side in a round")
    arguments.add_argument("--model", default="llama-3m")
    options = arguments.parse_args()
    context = mp.get_context("spawn")
    out, port = context.Queue(), free_port()
    ranks = [context.Process(target=rank_main, args=(rank, port, options, out)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    rounds = out.get()
    for process in ranks:
        process.join()
    best = min(statistics.median(seconds for seconds, _ in rounds[name]) for name in PEERS)
    table = Table("setting", "steps/s", "against the best peer", "loopback MB a step")
    for name, seen in rounds.items():
        seconds = statistics.median(seconds for seconds, _ in seen)
        ratios = [min(rounds[p][i][0] for p in PEERS) / seen[i][0] for i in range(options.rounds)]
        sent = statistics.median(count for _, count in seen)
        table.add_row(
            name,
            f"{1 / seconds:.3f}",
            f"{best / seconds:.3f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{sent / 1e6:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
