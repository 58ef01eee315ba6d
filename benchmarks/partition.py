"""steps/s and bytes of the engine's settings against torch's DDP, FSDP2 and FSDP2-HSDP, alternating in one run.

Two nodes of two ranks on loopback (so: no slow link), the same model, batch, AdamW and accumulation for all. HSDP's
all-reduce is deferred to the last micro-batch, the fair baseline. Bytes over all ranks and per step: what the ledger says
was sent, and what the kernel counted on loopback (acknowledgements and headers included). thinwire's ranks of one host
read each other's memory, so nothing is on loopback but for the rows named "sockets", where they do as the peers do.

    OMP_NUM_THREADS=1 python benchmarks/partition.py
"""

import argparse
import multiprocessing as mp
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from sides import CLUSTER, TORCH, WIRES, Setting, Side, thinwire_side
from torch import Tensor

from thinwire import World
from thinwire.comm.device import keep_heap
from thinwire.model.presets import preset
from thinwire.train.launch import free_port

RANKS, ACCUMULATE, SEQUENCES, TOKENS = 4, 2, 4, 256
PLANS: dict[str, dict[str, Any]] = {
    **{name: WIRES[name] for name in ("ddp", "hsdp", "auto", "auto+int8", "auto+int4")},
    "zero3": {"partition": "zero3"},
    "auto, kept": {"partition": "auto", "keep_gathered": True},
}
SOCKETS = ("ddp", "auto")
PEERS = ("torch DDP", "FSDP2", "FSDP2-HSDP")


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def timed(side: Side, batches: list[Tensor], steps: int, world: World) -> tuple[float, float, float]:
    """(seconds, bytes by the ledger, bytes on loopback) per step, after everybody is ready."""
    world.ledger.drain()
    dist.barrier()
    before, start_s = loopback_bytes(), time.perf_counter()
    for _ in range(steps):
        side.step(batches)
    side.finish()
    dist.barrier()
    took_s, crossed = time.perf_counter() - start_s, loopback_bytes() - before
    sent = torch.tensor([float(sum(entry.sent_bytes for entry in world.ledger.drain().entries))])
    dist.all_reduce(sent)
    return took_s / steps, float(sent) / steps, crossed / steps


def rank_main(rank: int, port: int, options: argparse.Namespace, out: Any) -> None:
    keep_heap()  # for every side
    torch.set_num_threads(1)
    setting = Setting(model=options.model, lr=1e-3, rank=rank, ranks=RANKS, environment={}, accumulate=ACCUMULATE)
    world = World.join(CLUSTER, rank=rank, size=RANKS, local_rank=rank, host="127.0.0.1", port=port)
    draw = torch.Generator().manual_seed(rank)
    vocab = preset(options.model).vocab_size
    batches = [torch.randint(0, vocab, (SEQUENCES, TOKENS + 1), generator=draw) for _ in range(ACCUMULATE)]
    sides = {name: thinwire_side(setting, options=plan, world=world) for name, plan in PLANS.items()}
    far = world.through_sockets(range(len(CLUSTER.levels)))
    sides |= {f"{name}, sockets": thinwire_side(setting, options=PLANS[name], world=far) for name in SOCKETS}
    sides |= {name: TORCH[name](setting) for name in PEERS}
    for side in sides.values():
        timed(side, batches, 2, world)
    rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(timed(sides[name], batches, options.steps, world))
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
    best = min(statistics.median(seconds for seconds, *_ in rounds[name]) for name in PEERS)
    table = Table("setting", "steps/s", "against the best peer", "sent, MB a step", "on loopback, MB")
    for name, seen in rounds.items():
        seconds = statistics.median(seconds for seconds, *_ in seen)
        ratios = [min(rounds[p][i][0] for p in PEERS) / seen[i][0] for i in range(options.rounds)]
        sent, crossed = (statistics.median(counts) for counts in list(zip(*seen, strict=True))[1:])
        table.add_row(
            name,
            f"{1 / seconds:.3f}",
            f"{best / seconds:.3f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{sent / 1e6:.1f}" if name not in PEERS else "",
            f"{crossed / 1e6:.1f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
