"""Training speed on slow links: thinwire's plans and the systems people use, on two emulated hosts of two ranks each.

Sides take turns. Each one is a command on the lab: it trains `--loss-steps` steps on an unlimited link, says its loss on
held-out text, then trains at every rate. Bytes are what the kernel counted at the interface of the busier host, times
are means over the steps of a phase and medians over rounds; the longest step is in units of the median one. A side that
fails has its error in its row.

    OMP_NUM_THREADS=1 python benchmarks/thin_network.py --rates 1000 100 20 --rounds 2
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from driver import Result, drive
from pages import Report, versions
from pages import write as write_pages
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sides import EXACT, NO_NETWORK, WAITING
from thin_rank import SIDES

from thinwire.lab.config import LabConfig
from thinwire.lab.lab import Lab
from thinwire.model.presets import preset

HOSTS, RANKS_PER_HOST = 2, 2
RANKS = HOSTS * RANKS_PER_HOST
PAGE = Report("thin_network", "Slow links, in one run", "tokens/s by side and rate")
RANK_PROGRAM = str(Path(__file__).with_name("thin_rank.py"))


def run_side(lab: Lab, name: str, options: argparse.Namespace) -> tuple[list[Result], str | None]:
    """(one result per phase that was finished, what went wrong if something did)."""
    job = {
        "side": name, "model": options.model, "lr": options.lr, "seed": options.seed, "sequences": options.sequences,
        "tokens": options.tokens, "accumulate": options.accumulate, "steps": options.steps,
        "loss_steps": options.loss_steps, "budget_s": options.budget_s, "inner_steps": options.inner_steps,
    }  # fmt: skip
    return drive(lab, RANK_PROGRAM, job, [None, *options.rates], timeout_s=options.timeout_s)


def measure(options: argparse.Namespace, each: Callable[[dict[str, Result]], None]) -> dict[str, Result]:
    """What each side did: its phases over all rounds, and its error if it had one. `each` sees it after every turn."""
    seen: dict[str, Result] = {name: {"phases": [], "error": None} for name in options.sides}
    with Lab(LabConfig(hosts=HOSTS, ranks_per_host=RANKS_PER_HOST)) as lab:
        for number in range(options.rounds):
            shift = number % len(options.sides)
            for name in options.sides[shift:] + options.sides[:shift]:
                start_s = time.monotonic()
                phases, error = run_side(lab, name, options)
                seen[name]["phases"] += phases
                seen[name]["error"] = seen[name]["error"] or error
                told = error or ", ".join(f"{rate_name(p['rate'])} {p['step_s']:.2f} s" for p in phases)
                print(f"round {number + 1}: {name} ({time.monotonic() - start_s:.0f} s): {told}", flush=True)
                each(seen)
    return seen


def rate_name(rate: float | None) -> str:
    return "unlimited" if rate is None else f"{rate:g} Mbit/s"


def summary(seen: dict[str, Result], options: argparse.Namespace) -> list[Result]:
    """A row per side: loss, MB a step by the kernel, and by rate tokens/s and share of the no-network speed."""
    tokens = options.sequences * options.tokens * options.accumulate * RANKS
    return [row_of(name, seen[name], tokens, fastest(seen), options) for name in options.sides]


def fastest(seen: dict[str, Result]) -> float | None:
    """Seconds of a step without any network."""
    phases = seen.get(NO_NETWORK, {"phases": []})["phases"]
    return statistics.median(phase["step_s"] for phase in phases) if phases else None


def row_of(name: str, side: Result, tokens: int, free_s: float | None, options: argparse.Namespace) -> Result:
    row: Result = {"side": name, "error": side["error"], "rates": {}}
    losses = [phase["loss"] for phase in side["phases"] if "loss" in phase]
    row["loss"] = statistics.median(losses) if losses else None
    sent = [phase["sent_bytes"] / 1e6 for phase in side["phases"]]
    row["sent_mb"] = statistics.median(sent) if sent else None
    for rate in [None, *options.rates]:
        phases = [phase for phase in side["phases"] if phase["rate"] == rate]
        if phases:
            step_s = statistics.median(phase["step_s"] for phase in phases)
            share = None if free_s is None else free_s / step_s
            longest = statistics.median(phase.get("longest_step", math.nan) for phase in phases)
            row["rates"][rate_name(rate)] = {
                "tokens_per_s": tokens / step_s, "step_s": step_s, "share": share, "longest_step": longest,
            }  # fmt: skip
    return row


def limits(options: argparse.Namespace, seen: dict[str, Result]) -> Result:
    """What no side can beat: the no-network speed; for exact methods 4 bytes a parameter out of each host."""
    least = 4 * preset(options.model).parameters
    free_s = fastest(seen)
    tokens = options.sequences * options.tokens * options.accumulate * RANKS
    bounds = {rate_name(rate): tokens / max(free_s or 0.0, least / (rate * 1e6 / 8)) for rate in options.rates}
    return {
        "least_exact_mb": least / 1e6,
        "no_network_tokens_per_s": None if free_s is None else tokens / free_s,
        "exact_tokens_per_s": bounds,
    }


def cells(row: Result, rates: list[str], bound: Result) -> list[str]:
    """The row of a table, as text."""
    if not row["rates"]:
        return [f"{row['side']}: {row['error'] or 'not measured'}", *[""] * (len(rates) + 3)]
    shown = [row["rates"].get(rate) for rate in rates]
    speeds = ["-" if s is None else speed(s) for s in shown]
    sent = f"{row['sent_mb']:.2f}"
    of_least = f"{row['sent_mb'] / bound['least_exact_mb']:.3f}"
    loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
    name = row["side"] + (" (exact)" if row["side"] in EXACT else "")
    return [name + (f": {row['error']}" if row["error"] else ""), sent, of_least, *speeds, loss]


def speed(at_rate: Result) -> str:
    """tokens/s, the share of the no-network speed, the longest step over the median one."""
    notes = [] if at_rate["share"] is None else [f"{at_rate['share']:.0%}"]
    if not math.isnan(at_rate["longest_step"]):
        notes.append(f"longest step {at_rate['longest_step']:.2f}")
    return f"{at_rate['tokens_per_s']:.0f}" + (f" ({', '.join(notes)})" if notes else "")


def header(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(names of the columns, names of the rates)."""
    rates = [rate_name(rate) for rate in [None, *options.rates]]
    loss = f"loss after {options.loss_steps} steps"
    return ["side", "MB/step out of a host", "of 4Ψ", *(f"tokens/s {rate}" for rate in rates), loss], rates


def bound_lines(report: Result) -> list[str]:
    bound = report["limits"]
    free = bound["no_network_tokens_per_s"]
    return [
        f"An exact fp32 method sends at least 4Ψ = {bound['least_exact_mb']:.2f} MB a step out of each host.",
        "Without any network: " + ("not measured" if free is None else f"{free:.0f} tokens/s") + ".",
        "The most an exact method can reach, by bytes / rate and compute, without headers: "
        + ", ".join(f"{rate}: {speed:.0f} tokens/s" for rate, speed in bound["exact_tokens_per_s"].items())
        + ".",
    ]


def show(report: Result, options: argparse.Namespace) -> None:
    columns, rates = header(options)
    table = Table(*columns)
    for row in report["rows"]:
        table.add_row(*map(escape, cells(row, rates, report["limits"])))
    console = Console(width=max(140, Console().width))
    console.print(table)
    for line in bound_lines(report):
        console.print(line)


def report_of(seen: dict[str, Result], options: argparse.Namespace) -> Result:
    return {
        "command": " ".join(["python", "benchmarks/thin_network.py", *(shlex.quote(word) for word in sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("thinwire", "deepspeed", "torchft"),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "again")},
        "limits": limits(options, seen),
        "rows": summary(seen, options),
        "phases": seen,
    }


def write(report: Result, options: argparse.Namespace) -> None:
    """Into `--out`, if there is one. Matplotlib is needed for this alone."""
    if options.out is not None:
        from figures import draw

        columns, rates = header(options)
        rows = [cells(row, rates, report["limits"]) for row in report["rows"]]
        write_pages(PAGE, report, options.out, draw(report), columns, rows, bound_lines(report))


def again(path: Path) -> None:
    """Make tables and figure anew, beside the JSON, from what it says was measured."""
    report = json.loads(path.read_text(encoding="utf-8"))
    options = argparse.Namespace(**report["options"], out=path.parent)
    report |= {"limits": limits(options, report["phases"]), "rows": summary(report["phases"], options)}
    write(report, options)
    show(report, options)


def main() -> None:
    options = parse()
    if options.again is not None:
        again(options.again)
        return
    seen = measure(options, lambda seen: write(report_of(seen, options), options))
    show(report_of(seen, options), options)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rates", type=float, nargs="*", default=[1000, 100, 20], help="Mbit/s, besides unlimited")
    arguments.add_argument(
        "--sides", nargs="*", default=[n for n in SIDES if n not in WAITING], help="of: " + ", ".join(SIDES)
    )
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=4, help="most steps of a side at each rate in a round")
    arguments.add_argument(
        "--budget-s", type=float, default=120, help="fewer steps if they would take longer than this"
    )
    arguments.add_argument("--loss-steps", type=int, default=40, help="steps on the unlimited link, before the loss")
    arguments.add_argument(
        "--inner-steps", type=int, default=20, help="steps between two rounds of LocalSGD and DiLoCo"
    )
    arguments.add_argument("--timeout-s", type=float, default=1800, help="for one side in one round")
    arguments.add_argument("--model", default="llama-11m")
    arguments.add_argument("--sequences", type=int, default=2, help="of a rank's micro-batch")
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--accumulate", type=int, default=1)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="folder for JSON, Markdown, PNG and HTML, say docs/benchmarks")
    arguments.add_argument("--again", type=Path, help="measure nothing: tables and figure from this report's JSON")
    options = arguments.parse_args(words)
    unknown = [name for name in options.sides if name not in SIDES]
    if unknown:
        arguments.error(f"there is no side {unknown[0]!r}; there are {', '.join(SIDES)}")
    if options.loss_steps % options.inner_steps or options.loss_steps < 2 * options.inner_steps:
        arguments.error("--loss-steps must be a multiple of --inner-steps, and at least twice as many")
    preset(options.model)
    return options


if __name__ == "__main__":
    main()
