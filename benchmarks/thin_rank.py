"""One rank of one side of `thin_network.py`: trains through phases, each at a link rate that the lab's owner sets.

After a warm-up, phase 0 runs unlimited and ends with the loss on held-out text after as many steps for all sides.
Rank 0 says `ready-N` in the folder, and the owner answers `go-N` once the links have the phase's rate. Bytes are what
the kernel counted at the host's interface; time is rank 0's, from a barrier to a barrier.
"""

import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import PEERS
from sides import NO_NETWORK, THINWIRE, TORCH, WAITING, Builder, Setting, Side, alone
from torch import Tensor

from thinwire.comm.device import keep_heap
from thinwire.lab.outcome import read_interfaces

SIDES: dict[str, Builder] = {NO_NETWORK: alone, **THINWIRE, **TORCH, **PEERS, **WAITING}
TEXT_BYTES, HELD_OUT_SEQUENCES = 4_000_000, 8


def setting_of(job: Mapping[str, Any], environment: Mapping[str, str]) -> Setting:
    """What the sides are built from, for the rank that torchrun's variables name."""
    return Setting(
        model=job["model"],
        lr=job["lr"],
        rank=int(environment["RANK"]),
        ranks=int(environment["WORLD_SIZE"]),
        environment=environment,
        accumulate=job["accumulate"],
        inner_steps=job["inner_steps"],
    )


def text() -> Tensor:
    """Bytes of Python's own library, in order of name."""
    read = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        read += path.read_bytes()
        if len(read) >= TEXT_BYTES:
            break
    return torch.frombuffer(read, dtype=torch.uint8)


def batches(stream: Tensor, job: dict[str, Any], rank: int) -> Iterator[list[Tensor]]:
    """This rank's micro-batches, step by step: random windows, the same for every side."""
    draw = torch.Generator().manual_seed(1000 * job["seed"] + rank)
    length = job["tokens"] + 1
    while True:
        starts = torch.randint(0, len(stream) - length, (job["accumulate"], job["sequences"]), generator=draw)
        yield [torch.stack([stream[start : start + length] for start in row.tolist()]).long() for row in starts]


def held_out(stream: Tensor, job: dict[str, Any]) -> list[Tensor]:
    length = job["tokens"] + 1
    rows = stream[-HELD_OUT_SEQUENCES * length :].view(HELD_OUT_SEQUENCES, length).long()
    return list(rows.split(2))


def validation(side: Side, rows: list[Tensor]) -> float:
    """Mean held-out loss over the ranks' models, which are equal for sides that agree every step."""
    side.finish()
    with torch.no_grad():
        mean = torch.stack([side.loss(row) for row in rows]).mean().double()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def sent_bytes() -> int:
    return read_interfaces(Path("/proc/net/dev").read_text(encoding="ascii"))["eth0"].sent_bytes


def agree(value: int) -> int:
    """Rank 0's value."""
    told = torch.tensor([value])
    dist.broadcast(told, 0)
    return int(told)


def timed(side: Side, feed: Iterator[list[Tensor]], steps: int, budget_s: float) -> dict[str, float]:
    """Up to `steps` steps, fewer if they would take longer than the budget, at least one period."""
    dist.barrier()
    before, start_s = sent_bytes(), time.perf_counter()
    lasted_s = [one_step(side, feed) for _ in range(side.period)]
    took_s = time.perf_counter() - start_s
    periods = agree(max(1, int(min(-(-steps // side.period), budget_s / took_s))))
    lasted_s += [one_step(side, feed) for _ in range((periods - 1) * side.period)]
    side.finish()
    dist.barrier()
    seconds = time.perf_counter() - start_s
    longest = max(lasted_s) / statistics.median(lasted_s)
    most = torch.tensor([float(sent_bytes() - before), longest], dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    count = periods * side.period
    return {
        "steps": count, "step_s": seconds / count, "sent_bytes": float(most[0]) / count, "longest_step": float(most[1]),
    }  # fmt: skip


def one_step(side: Side, feed: Iterator[list[Tensor]]) -> float:
    """Seconds it took this rank."""
    start_s = time.perf_counter()
    side.step(next(feed))
    return time.perf_counter() - start_s


def wait_for_go(folder: Path, phase: int, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        (folder / f"ready-{phase}").touch()
    while not (folder / f"go-{phase}").exists():
        time.sleep(0.02)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    keep_heap()  # for every side
    torch.set_num_threads(1)
    setting, folder = setting_of(job, os.environ), Path(job["folder"])
    rank = setting.rank
    stream = text()
    rows = held_out(stream, job)
    feed = batches(stream[: -HELD_OUT_SEQUENCES * (job["tokens"] + 1)], job, rank)
    side = SIDES[job["side"]](setting)
    warm = side.period * -(-2 // side.period)
    for _ in range(warm):
        side.step(next(feed))  # buffers, bucket orders and connections are made in the first steps
    for phase, rate in enumerate(job["rates"]):
        wait_for_go(folder, phase, rank)
        first = phase == 0
        steps, budget_s = (job["loss_steps"] - warm, math.inf) if first else (job["steps"], job["budget_s"])
        result: dict[str, Any] = timed(side, feed, steps, budget_s)
        result["rate"] = rate
        if first:
            result["loss"] = validation(side, rows)
        if rank == 0:
            (folder / f"result-{phase}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    side.close()


if __name__ == "__main__":
    main()
