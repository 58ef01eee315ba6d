"""What outer synchronisation costs in loss, and saves in bytes: every kind beside data-parallel training, equal tokens.

Every run is `thinwire train` in full, one rank a group, on the bytes of Python's library. Kinds differ in `[plan.sync]`
alone, which is left at each kind's defaults but for the outer rate and momentum that all Nesterov kinds are given; `no
exchange` is one group with its share of the batch, on its own; `summed` are groups in two nodes, whose bytes are those
between the nodes. The loss is that of the outer weights on held-out text,
the bytes are those the run's own ledger counted between the groups. Finished runs stand in OUT/outer_study.jsonl and are
not made again, so that a study can be interrupted, continued and extended. The report is made when no run is left.

    python benchmarks/outer_study.py --out docs/benchmarks
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outer_table import COLUMNS, cells, curves, least_exact_mb, summary, verdicts
from pages import Report, versions, write
from rich.console import Console
from rich.table import Table
from train_runs import train

from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

Record = dict[str, Any]
NAME = "outer_study"
PAGE = Report(NAME, "Outer synchronisation: loss and bytes", "validation loss by tokens and by bytes sent")
BASE, ALONE, SUMMED = "data-parallel", "no exchange", "streaming e3m0 summed"
KINDS: dict[str, dict[str, str]] = {
    BASE: {},
    ALONE: {},
    "diloco": {"kind": "diloco"},
    "streaming fp32": {"kind": "streaming_diloco", "codec": "fp32"},
    "streaming e3m0": {"kind": "streaming_diloco", "codec": "e3m0"},
    "streaming int4": {"kind": "streaming_diloco", "codec": "int4"},
    SUMMED: {"kind": "streaming_diloco", "codec": "e3m0", "level": "node", "sum_inside": "node"},
    "eager": {"kind": "eager"},
    "co2": {"kind": "co2"},
}
NESTEROV = ("diloco", "streaming fp32", "streaming e3m0", "streaming int4", SUMMED, "eager")
"""The kinds that share an outer optimizer; CO2 brings its own."""
HEAD = 16
SETTING = (
    "hidden", "layers", "steps", "sequences", "tokens", "lr", "warmup_steps", "outer_lr", "outer_momentum", "look",
    "eval_sequences",
)  # fmt: skip
"""The options that all runs of a study share."""


@dataclass(frozen=True)
class Run:
    """One run of the study. H is 1 where there are no rounds: data-parallel training, and one group on its own."""

    seed: int
    groups: int
    inner_steps: int
    kind: str


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed of the fewest groups first: a study that is cut short has all kinds of the seeds it got to."""
    kinds = [kind for kind in options.kinds if KINDS[kind]]
    for groups in options.groups:
        for seed in options.seeds:
            yield Run(seed, groups, 1, BASE)
            if ALONE in options.kinds:
                yield Run(seed, groups, 1, ALONE)
            for inner_steps in options.inner_steps:
                yield from (Run(seed, groups, inner_steps, kind) for kind in kinds if kind != SUMMED or groups > 2)


def settings(run: Run, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is set over the run file. Validation comes at the end of a round, and not more often than `--look`."""
    sync: dict[str, Any] = {}
    if KINDS[run.kind]:
        sync = {**KINDS[run.kind], "inner_steps": run.inner_steps}
    if run.kind in NESTEROV:
        sync |= {"outer_lr": options.outer_lr, "outer_momentum": options.outer_momentum}
    ranks, share = (1 if run.kind == ALONE else run.groups), options.sequences // run.groups
    rounds = -(-options.look // run.inner_steps)
    return {
        **model(options),
        "data.path": options.corpus, "data.tokenizer": "bytes",
        "batch.sequences": share * ranks, "batch.micro_batch": share, "batch.tokens": options.tokens,
        "optimizer.lr": options.lr, "schedule.kind": "cosine", "schedule.warmup_steps": options.warmup_steps,
        "cluster.levels": f"[{ranks // 2}, 2]" if run.kind == SUMMED else f"[{ranks}]", "plan.partition": "ddp",
        **{f"plan.sync.{key}": value for key, value in sync.items()},
        "run.folder": folder, "run.steps": options.steps, "run.seed": run.seed,
        "run.eval_every": rounds * run.inner_steps, "run.eval_sequences": options.eval_sequences,
    }  # fmt: skip


def model(options: argparse.Namespace) -> dict[str, Any]:
    """A Llama with heads of 16 and feed-forward layers of three times its width."""
    heads = options.hidden // HEAD
    return {
        "model.preset": "llama-1m", "model.hidden": options.hidden, "model.layers": options.layers, "model.heads": heads,
        "model.kv_heads": heads, "model.head_size": HEAD, "model.ffn": 3 * options.hidden,
        "model.max_tokens": options.tokens,
    }  # fmt: skip


def measure(run: Run, options: argparse.Namespace) -> Record:
    """The run's validation losses, each with the tokens trained on and the bytes rank 0 has sent by then."""
    with tempfile.TemporaryDirectory() as base:
        folder, start_s = Path(base) / "run", time.monotonic()
        train(options.run_file, settings(run, options, folder))
        seconds = round(time.monotonic() - start_s, 1)
        return {
            **asdict(run),
            "steps": options.steps,
            "seconds": seconds,
            **read(
                folder / EVENTS_FILE, options.sequences * options.tokens, "cluster" if run.kind == SUMMED else "node"
            ),
        }


def read(path: Path, step_tokens: int, level: str) -> Record:
    """Parameters, and the curve: a point for every validation.

    `step_tokens` are those of all groups together, `level` is the one whose bytes count.
    """
    start = next(read_events(path, "run_start"))
    losses = {record["step"]: record["loss"] for record in read_events(path, "eval")}
    sent, curve = 0, [{"tokens": 0, "sent_bytes": 0, "loss": losses[0]}]
    for number, step in sorted(steps(path).items()):
        sent += sum(step["wire"].get(level, {}).values())
        if number in losses:
            curve.append({"tokens": number * step_tokens, "sent_bytes": sent, "loss": losses[number]})
    return {"parameters": start["parameters"], "curve": curve}


class Book:
    """The finished runs of a folder, one JSON object a line after a first line with the setting all of them share."""

    def __init__(self, path: Path, setting: Record) -> None:
        """Raises SystemExit if the runs there are of another setting."""
        self.path, self.records = path, []
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"setting": setting})
            return
        there, self.records = lines[0]["setting"], lines[1:]
        for key, value in setting.items():
            if there.get(key) != value:
                raise SystemExit(
                    f"{path} holds runs with {key} = {there.get(key)!r}, not {value!r}; give the same, or another --out"
                )

    def holds(self, run: Run) -> bool:
        return any(asdict(run).items() <= record.items() for record in self.records)

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._append(record)

    def _append(self, line: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    options = parse()
    book = Book(options.out / f"{NAME}.jsonl", {key: getattr(options, key) for key in SETTING})
    missing = [run for run in planned(options) if not book.holds(run)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for record in pool.map(lambda run: measure(run, options), missing[: options.at_most]):
            book.add(record)
            run = ", ".join(f"{key} {record[key]}" for key in ("seed", "groups", "inner_steps", "kind"))
            print(f"{run}: loss {record['curve'][-1]['loss']:.4f} ({record['seconds']:.0f} s)", flush=True)
    left = 0 if options.at_most is None else len(missing[options.at_most :])
    if left:
        print(f"{left} runs are left; the same command goes on with them")
    if book.records and (options.at_most == 0 or not left):
        show(book.records, left, options)


def show(records: list[Record], left: int, options: argparse.Namespace) -> None:
    """The table, and with all of it the report in `--out`. Matplotlib is needed for that alone."""
    from outer_figure import draw

    rows = summary(records, BASE)
    table, lines = Table(*COLUMNS), verdicts(rows)
    if left:
        lines.append(f"{left} of the {len(list(planned(options)))} runs of the command below are not made yet.")
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=max(120, Console().width))
    console.print(table)
    for line in lines:
        console.print(line)
    picture = draw(
        curves(records),
        {groups: least_exact_mb(records, groups) for groups in {record["groups"] for record in records}},
    )
    write(PAGE, report_of(records, rows, options), options.out, picture, COLUMNS, [cells(row) for row in rows], lines)


def report_of(records: list[Record], rows: list[Record], options: argparse.Namespace) -> Record:
    words = [word for word in sys.argv[1:] if word not in ("--at-most", "0")]
    return {
        "command": " ".join(["python", "benchmarks/outer_study.py", *map(shlex.quote, words)]),
        "date": time.strftime("%Y-%m-%d"), "versions": versions("thinwire"),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "at_most", "jobs")},
        "parameters": records[0]["parameters"], "rows": rows,
    }  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run-file", default="examples/stdlib.toml")
    arguments.add_argument("--corpus", default="runs/corpora/stdlib-bytes", help="prepared on first use")
    arguments.add_argument("--groups", type=int, nargs="+", default=[2, 4], help="M")
    arguments.add_argument("--inner-steps", type=int, nargs="+", default=[30, 100], help="H")
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help=f"besides {BASE}, the base")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    arguments.add_argument("--hidden", type=int, default=32, help=f"width of the model, a multiple of {HEAD}")
    arguments.add_argument("--layers", type=int, default=4, help="of the model")
    arguments.add_argument("--steps", type=int, default=1200)
    arguments.add_argument("--sequences", type=int, default=64, help="of all groups together in a step")
    arguments.add_argument("--tokens", type=int, default=64, help="of a sequence")
    arguments.add_argument("--lr", type=float, default=5e-3, help="of the inner optimizer, cosine")
    arguments.add_argument("--warmup-steps", type=int, default=60)
    arguments.add_argument("--outer-lr", type=float, default=0.6, help="of the kinds with Nesterov momentum")
    arguments.add_argument("--outer-momentum", type=float, default=0.6, help="likewise; the default of a run is 0.9")
    arguments.add_argument("--look", type=int, default=50, help="least steps between two validations")
    arguments.add_argument("--eval-sequences", type=int, default=256)
    arguments.add_argument("--jobs", type=int, default=1, help="runs made at the same time")
    arguments.add_argument("--at-most", type=int, help="make so many of the missing runs; 0: the report alone")
    arguments.add_argument("--out", type=Path, default=Path("runs/outer_study"), help="folder of runs and report")
    options = arguments.parse_args(words)
    for inner_steps in options.inner_steps:
        if options.steps % inner_steps:
            arguments.error(
                f"--steps = {options.steps} is not a multiple of H = {inner_steps}: the last steps would not count"
            )
    if options.hidden % HEAD:
        arguments.error(f"--hidden = {options.hidden} is not a multiple of {HEAD}")
    for groups in options.groups:
        if options.sequences % groups:
            arguments.error(f"--sequences = {options.sequences} cannot be split over {groups} groups")
    return options


if __name__ == "__main__":
    main()
