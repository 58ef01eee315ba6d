"""Time and bytes to the validation loss that PyTorch's plain DDP has after N steps, on a slow link.

DDP goes first, with each seed; its loss after `--steps` steps is the target. Every other side then trains on the same
batches until its loss, looked at every `--every` steps, is at most that, or gives up after `--most` times as many
steps. Evaluation is not timed. Bytes are the kernel's, out of the busier host, from the first step. What a step takes
without any network is measured first, over `--every` steps.

    OMP_NUM_THREADS=1 python benchmarks/time_to_loss.py --steps 40 --every 10 --inner-steps 10 --out docs/benchmarks
"""

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from driver import Result, drive
from pages import Report, versions
from pages import write as write_pages
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sides import NO_NETWORK, Setting
from thin_rank import (
    HELD_OUT_SEQUENCES,
    SIDES,
    batches,
    held_out,
    sent_bytes,
    setting_of,
    text,
    validation,
    wait_for_go,
)

from thinwire.comm.device import keep_heap
from thinwire.lab.config import LabConfig
from thinwire.lab.lab import Lab
from thinwire.model.presets import preset

PAGE = Report("time_to_loss", "To the loss of DDP, on a slow link", "held-out loss by seconds and by bytes")
COLUMNS = ["side", "steps", "seconds", "of DDP's", "MB out of a host", "of DDP's"]
BASE = "torch DDP"
SLACK = 1e-3
"""Nats above DDP's loss that still meet it: sums in another order may not cost an exact method a whole look."""


def be_rank(job: dict[str, Any]) -> None:
    """One rank: trains until the target, writes every look at the loss."""
    keep_heap()  # for every side
    torch.set_num_threads(1)
    setting: Setting = setting_of(job, os.environ)
    stream, folder = text(), Path(job["folder"])
    rows = held_out(stream, job)
    feed = batches(stream[: -HELD_OUT_SEQUENCES * (job["tokens"] + 1)], job, setting.rank)
    side = SIDES[job["side"]](setting)
    wait_for_go(folder, 0, setting.rank)
    target = -math.inf if job["target"] is None else job["target"]
    looks: list[Result] = []
    seconds, sent = 0.0, 0
    for number in range(job["most_steps"] // job["every"]):
        dist.barrier()
        before, start_s = sent_bytes(), time.perf_counter()
        for _ in range(job["every"]):
            side.step(next(feed))
        side.finish()
        dist.barrier()
        seconds, sent = seconds + time.perf_counter() - start_s, sent + sent_bytes() - before
        most = torch.tensor([float(sent)], dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        loss = validation(side, rows)
        steps = (number + 1) * job["every"]
        looks.append({"steps": steps, "seconds": seconds, "sent_bytes": float(most), "loss": loss})
        if setting.rank == 0:
            (folder / "result-0.json").write_text(json.dumps({"looks": looks}), encoding="utf-8")
        if loss <= target:
            break
    dist.barrier()
    side.close()


def measure(
    lab: Lab, options: argparse.Namespace, name: str, seed: int, target: float | None, most: int | None = None
) -> Result:
    """The looks at one side's loss, its error if it had one, and whether the last look met the target."""
    most = most or (options.steps if target is None else int(options.steps * options.most))
    job = {
        "side": name, "target": target, "most_steps": most, "every": options.every, "seed": seed, "model": options.model,
        "lr": options.lr, "sequences": options.sequences, "tokens": options.tokens, "accumulate": options.accumulate,
        "inner_steps": options.inner_steps,
    }  # fmt: skip
    results, error = drive(lab, __file__, job, [options.rate], timeout_s=options.timeout_s)
    looks = results[0]["looks"] if results else []
    reached = bool(looks) and (target is None or looks[-1]["loss"] <= target)
    return {"side": name, "seed": seed, "looks": looks, "error": error, "reached": reached and error is None}


def run(options: argparse.Namespace, each: Callable[[list[Result]], None]) -> list[Result]:
    """The step without any network, then all sides, seed by seed. `each` sees what there is after every one."""
    with Lab(LabConfig(hosts=2, ranks_per_host=2)) as lab:
        seen = [measure(lab, options, NO_NETWORK, options.seeds[0], None, most=options.every)]
        for seed in options.seeds:
            base = measure(lab, options, BASE, seed, None)
            if not base["reached"]:
                raise SystemExit(f"{BASE} failed, so there is no target: {base['error']}")
            target = base["looks"][-1]["loss"] + SLACK
            seen.append(base)
            for name in options.sides:
                seen.append(measure(lab, options, name, seed, target))
                last = seen[-1]["looks"][-1:] or [seen[-1]["error"]]
                print(f"seed {seed}, target {target:.4f}: {name}: {last[0]}", flush=True)
                each(seen)
    return seen


def limits(seen: list[Result], options: argparse.Namespace) -> Result:
    """What DDP's steps take at least: without any network, and for exact methods, which send 4 bytes a parameter."""
    free = next((r["looks"][-1] for r in seen if r["side"] == NO_NETWORK and r["looks"]), None)
    free_s = None if free is None else free["seconds"] / free["steps"]
    least = 4 * preset(options.model).parameters
    exact_s = max(free_s or 0.0, least / (options.rate * 1e6 / 8))
    return {
        "no_network_s": None if free_s is None else options.steps * free_s,
        "exact_s": options.steps * exact_s,
        "exact_mb": options.steps * least / 1e6,
    }


def cells(name: str, seen: list[Result]) -> list[str]:
    """Medians over the seeds; ratios are against DDP with the same seed."""
    base = {result["seed"]: result["looks"][-1] for result in seen if result["side"] == BASE}
    mine = [result for result in seen if result["side"] == name]
    if not mine:
        return [name, "not measured", "", "", "", ""]
    failed = [result for result in mine if not result["reached"]]
    if failed:
        looks = failed[0]["looks"]
        ended = f"loss {looks[-1]['loss']:.4f} after {looks[-1]['steps']} steps" if looks else "no step was made"
        return [name, f"not reached: {failed[0]['error'] or ended}", "", "", "", ""]
    ends = [(result["looks"][-1], base[result["seed"]]) for result in mine]

    def median(key: str, scale: float = 1.0) -> str:
        return f"{statistics.median(end[key] for end, _ in ends) / scale:.4g}"

    def ratio(key: str) -> str:
        return f"{statistics.median(end[key] / theirs[key] for end, theirs in ends):.3f}"

    return [name, median("steps"), median("seconds"), ratio("seconds"), median("sent_bytes", 1e6), ratio("sent_bytes")]


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        be_rank(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        return
    options = parse()
    seen = run(options, lambda seen: write(seen, options))
    table = Table(*COLUMNS)
    for name in [BASE, *options.sides]:
        table.add_row(*map(escape, cells(name, seen)))
    console = Console(width=max(120, Console().width))
    console.print(table)
    for line in lines(seen, options):
        console.print(line)
    write(seen, options)


def lines(seen: list[Result], options: argparse.Namespace) -> list[str]:
    """What stands below the table."""
    bound = limits(seen, options)
    free = bound["no_network_s"]
    done = len({result["seed"] for result in seen if result["side"] != NO_NETWORK})
    return [
        f"{options.rate:g} Mbit/s between two hosts of two ranks; medians over {done} seed{'s' if done > 1 else ''}, ratios "
        f"with the same seed. The loss is looked at every {options.every} steps.",
        f"{options.steps} steps take at least "
        + ("" if free is None else f"{free:.0f} s without any network, ")
        + f"{bound['exact_s']:.0f} s and {bound['exact_mb']:.0f} MB out of each host with an exact fp32 method, without "
        "headers.",
    ]


def write(seen: list[Result], options: argparse.Namespace) -> None:
    """Into `--out`, if there is one. Matplotlib is needed for this alone."""
    if options.out is None:
        return
    from time_figure import draw

    report = {
        "command": " ".join(["python", "benchmarks/time_to_loss.py", *(shlex.quote(word) for word in sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("thinwire", "deepspeed", "torchft"),
        "limits": limits(seen, options),
        "runs": seen,
    }
    rows = [cells(name, seen) for name in [BASE, *options.sides]]
    write_pages(PAGE, report, options.out, draw(report), COLUMNS, rows, lines(seen, options))


def parse() -> argparse.Namespace:
    others = [name for name in SIDES if name not in (BASE, NO_NETWORK)]
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rate", type=float, default=100, help="Mbit/s")
    arguments.add_argument("--sides", nargs="*", default=others, help=f"besides {BASE}; default: all")
    arguments.add_argument("--steps", type=int, default=60, help="DDP's steps, whose loss is the target")
    arguments.add_argument("--every", type=int, default=20, help="steps between two looks at the loss")
    arguments.add_argument("--most", type=float, default=2.0, help="give up after this many times DDP's steps")
    arguments.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments.add_argument(
        "--inner-steps", type=int, default=20, help="steps between two rounds of LocalSGD and DiLoCo"
    )
    arguments.add_argument("--timeout-s", type=float, default=7200, help="for one side with one seed")
    arguments.add_argument("--model", default="llama-11m")
    arguments.add_argument("--sequences", type=int, default=2, help="of a rank's micro-batch")
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--accumulate", type=int, default=1)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--out", type=Path, help="folder for JSON, Markdown, PNG and HTML, say docs/benchmarks")
    options = arguments.parse_args()
    unknown = [name for name in options.sides if name not in SIDES]
    if unknown:
        arguments.error(f"there is no side {unknown[0]!r}; there are {', '.join(SIDES)}")
    if options.every % options.inner_steps or options.steps % options.every:
        arguments.error("--steps must be a multiple of --every, and --every one of --inner-steps")
    return options


if __name__ == "__main__":
    main()
