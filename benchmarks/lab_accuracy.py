"""How true the lab's links are: an all-reduce of 16 MiB against bytes / rate, and the kernel's bytes against the ledger's.

Every rank is a host of its own. Bytes are the ledger's (what a host must send, without any header); the kernel's are
those of the host's interface over the whole command, meeting each other included. Two all-reduces take turns: thinwire's
and gloo's own, which sends the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/lab_accuracy.py
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from thinwire.lab.config import LabConfig
from thinwire.lab.lab import Lab
from thinwire.units import show_rate

NUMBERS = 16 * 2**20 // 4


@dataclass(frozen=True)
class Row:
    """One lab: ratios of time to bytes / rate by method, and of kernel bytes to ledger bytes by host and direction."""

    hosts: int
    bytes_per_s: float
    times: dict[str, list[float]]
    bytes_sent: list[float]
    bytes_received: list[float]


def be_rank(hosts: int, rounds: int, folder: Path) -> None:
    """One rank: reduce, time, write what the ledger says."""
    import torch
    import torch.distributed as dist

    from thinwire.cluster.cluster import Cluster, Level
    from thinwire.comm.collectives import all_reduce, all_reduce_small
    from thinwire.comm.device import keep_heap
    from thinwire.comm.world import World

    keep_heap()
    torch.set_num_threads(1)
    world = World.from_environment(Cluster(levels=(Level(name="cluster", fanout=hosts),)), os.environ)
    x = torch.ones(NUMBERS)
    group = world.group(0, "reduce")

    def gloo() -> None:
        dist.all_reduce(x, group=group)

    def ours() -> None:
        all_reduce(x, world=world, level=0, purpose="timed")

    def seconds(work: Callable[[], None]) -> float:
        all_reduce_small(torch.zeros(1), world=world)
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s

    times: dict[str, list[float]] = {"thinwire": [], "gloo": []}
    for _ in range(rounds):
        for name, work in (("thinwire", ours), ("gloo", gloo)):
            longest = torch.tensor([seconds(work)])
            all_reduce_small(longest, world=world, op="max")
            times[name].append(longest.item())
    sent = world.ledger.drain().sent_bytes()["cluster"]
    world.leave()
    result = {"times": times, "timed_bytes": sent["timed"] / rounds, "sent_bytes": sum(sent.values()) + sent["timed"]}
    (folder / f"{world.rank}.json").write_text(json.dumps(result))


def measure(hosts: int, bytes_per_s: float, rounds: int) -> Row:
    """Build a lab, run the ranks, compare."""
    with tempfile.TemporaryDirectory() as folder, Lab(LabConfig(hosts=hosts, host_rate=bytes_per_s)) as lab:
        own = [sys.executable, __file__, "--rank-of", str(hosts), "--rounds", str(rounds), "--folder", folder]
        lab.start(own)
        outcome = lab.wait(timeout_s=600)
        if not outcome.ok:
            raise SystemExit((outcome.first_failure or outcome.ends[0]).tail())
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(hosts)]
    ideal_s = results[0]["timed_bytes"] / bytes_per_s
    return Row(
        hosts,
        bytes_per_s,
        {name: [seconds / ideal_s for seconds in times] for name, times in results[0]["times"].items()},
        [link.sent_bytes / own["sent_bytes"] for link, own in zip(outcome.traffic.hosts, results, strict=True)],
        [link.received_bytes / own["sent_bytes"] for link, own in zip(outcome.traffic.hosts, results, strict=True)],
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--hosts", type=int, nargs="*", default=[2, 4])
    arguments.add_argument("--mbit-per-s", type=float, nargs="*", default=[20, 100, 1000])
    arguments.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.rank_of is not None:
        be_rank(options.rank_of, options.rounds, options.folder)
        return
    table = Table("hosts", "rate", "thinwire: time / ideal", "gloo: time / ideal", "kernel / ledger: sent", "received")
    for hosts in options.hosts:
        for mbit_per_s in options.mbit_per_s:
            row = measure(hosts, mbit_per_s * 1e6 / 8, options.rounds)
            cells = [_median(row.times["thinwire"]), _median(row.times["gloo"])]
            spans = [_span(row.bytes_sent), _span(row.bytes_received)]
            table.add_row(str(hosts), show_rate(row.bytes_per_s), *cells, *spans)
    Console().print(table)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _span(values: list[float]) -> str:
    return f"{min(values):.4f}-{max(values):.4f}"


if __name__ == "__main__":
    main()
