"""Does the planner foresee our own runs? Probe, plan, then run: step time, bytes and memory of plans on this machine.

Worlds: 2 ranks and 2 x 2 ranks of this host, and 2 emulated hosts of 2 ranks behind 100 and 20 Mbit/s. A repeat probes the
cluster, predicts every plan from that probe alone with the planner's own functions, and only then runs the plans, one
after the other, each with `thinwire train`: a machine's speed changes within minutes, and a prediction is worth what its
probe is. A step is the median over the steps after the warm-up; the error of a plan is the median over the repeats.
Bytes are rank 0's ledger. Memory is what the engine's tensors of rank 0 hold for parameters, gradients and optimizer
states, and in one more run under torch's allocation profiler the most that all its tensors take at once (the resident
size of a CPU process says more about libraries).

    OMP_NUM_THREADS=1 python benchmarks/predict_own_runs.py --out docs/benchmarks
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import own_runs
import tomli_w
import torch
from own_runs import Measured, Predicted, Row
from rich.console import Console
from rich.table import Table

from thinwire.cli.plan import task
from thinwire.files.events import read_events, steps
from thinwire.planner.explain import rests_on
from thinwire.planner.search import step_time
from thinwire.predict.candidate import Candidate
from thinwire.predict.peak_memory import peak_memory
from thinwire.predict.placement import place
from thinwire.predict.planned import sent_bytes
from thinwire.train.folder import EVENTS_FILE

NAME, RUNS, PEAKS = "own_runs", "runs.json", "peaks.json"
PEAK_PROGRAM, PEAK_STEPS = str(Path(__file__).with_name("peak_rank.py")), 2
THINWIRE = [sys.executable, "-c", "from thinwire.cli import main; main()"]
WARM_UP = 2
"""Steps that do not count: buffers, orders of reduction and connections are made in them."""
CAUSES = ("matmul_s", "memory_s", "launch_s", "data_s", "optimizer_s", "hidden_s")


@dataclass(frozen=True)
class World:
    """Where plans run: levels, and the rate between two emulated hosts, if it is not this host alone."""

    levels: tuple[tuple[str, int], ...]
    mbit_per_s: float | None = None

    @property
    def ranks(self) -> int:
        return self.levels[0][1] * (self.levels[1][1] if len(self.levels) > 1 else 1)


PAIR, SQUARE = (("node", 2),), (("node", 2), ("cluster", 2))
WORLDS = {
    "2 ranks": World(PAIR),
    "2 x 2 ranks": World(SQUARE),
    "2 hosts x 2 ranks, 100 Mbit/s": World(SQUARE, 100),
    "2 hosts x 2 ranks, 20 Mbit/s": World(SQUARE, 20),
}


def _coded(weights: str, grads: str, level: str) -> str:
    return f"plan.compression={{weights={{{level}='{weights}'}}, grads={{{level}='{grads}'}}}}"


SMALL, AGAIN = "batch.micro_batch=1", "plan.recompute=full"


def plans_of(world: World) -> dict[str, list[str]]:
    """name -> settings, one for each decision that costs something there.

    Without a slow link where states lie costs next to nothing: plans that differ in nothing else take the same time, and
    have no order that a planner could foresee. Micro-batches and recomputation cost something everywhere.
    """
    outer = world.levels[-1][0]
    # The formula of peak memory is that of units that move by themselves; models this small would travel in one bucket.
    alone = "plan.bucket_bytes=0"
    ddp, zero1, zero3, auto = ([f"plan.partition={each}", alone] for each in ("ddp", "zero1", "zero3", "auto"))
    int4 = _coded("int8", "int4", outer)
    if world.levels == PAIR:
        return {
            "ddp": ddp,
            "zero3": zero3,
            "zero1, int4 gradients": [*zero1, int4],
            "zero1, recompute": [*zero1, AGAIN],
            "zero3 kept, micro-batches of 1": [*zero3, SMALL, "plan.keep_gathered=true"],
            "zero3, micro-batches of 1": [*zero3, SMALL],
            "zero1, micro-batches of 1, recompute": [*zero1, SMALL, AGAIN],
            "zero3, micro-batches of 1, recompute": [*zero3, SMALL, AGAIN],
            "the same, int4 gradients": [*zero3, SMALL, AGAIN, int4],
        }
    if world.mbit_per_s is None:
        return {
            "ddp": ddp,
            "auto": auto,
            "auto, int4 gradients": [*auto, int4],
            "auto, recompute": [*auto, AGAIN],
            "zero3, micro-batches of 2": [*zero3, "batch.micro_batch=2"],
            "auto, micro-batches of 1": [*auto, SMALL],
            "zero3, micro-batches of 1": [*zero3, SMALL],
            "auto, micro-batches of 1, recompute": [*auto, SMALL, AGAIN],
            "zero3, micro-batches of 1, recompute": [*zero3, SMALL, AGAIN],
        }
    return {
        "ddp": ddp,
        "zero3": zero3,
        "hsdp": ["plan.partition=hsdp"],
        "auto": auto,
        "auto, recompute": [*auto, AGAIN],
        "auto, int8": [*auto, _coded("int8", "int8", outer)],
        "auto, int4 gradients": [*auto, int4],
    }


def run_tree(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """The run file of a world, for the cluster file beside it."""
    return {
        "model": {"preset": options.model},
        "data": {"path": str(Path(options.corpus).absolute())},
        "batch": {
            "sequences": options.sequences * world.ranks, "tokens": options.tokens, "micro_batch": options.micro_batch,
        },
        "cluster": {"file": "cluster.toml"},
        "schedule": {"warmup_steps": 1},
        "checkpoint": {"every_steps": 0},
        "run": {"eval_every": 0, "eval_sequences": 0, "sample_tokens": 0},
    }  # fmt: skip


def start(world: World, words: list[str], folder: Path, *, train: bool = False) -> None:
    """Run thinwire in the world: on its lab if it has one. Raises SystemExit with the last lines if it fails."""
    command = [*THINWIRE, *words]
    if world.mbit_per_s is not None:
        lab = folder / "lab.toml"
        told = {"hosts": world.levels[1][1], "ranks_per_host": world.levels[0][1]}
        lab.write_text(tomli_w.dumps({**told, "host_rate": f"{world.mbit_per_s:g} Mbit/s"}))
        rest = ["--train", *words[1:]] if train else ["--out", str(folder / "logs"), "--", *command]
        command = [*THINWIRE, "lab", "run", str(lab), *rest]
    execute(command)


def execute(command: list[str]) -> None:
    """Run to the end, one thread a rank. Raises SystemExit with the last lines if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit("\n".join([shlex.join(command), *(done.stdout + done.stderr).splitlines()[-20:]]))


def probe(world: World, folder: Path, options: argparse.Namespace) -> None:
    """Write `cluster.toml`, and what it was measured as."""
    levels = ",".join(f"{name}={fanout}" for name, fanout in world.levels)
    words = ["probe", "--levels", levels, "-o", str(folder / "cluster.toml")]
    start(world, words + (["--quick"] if options.quick else []), folder)


def predict(run_file: Path, settings: list[str]) -> tuple[Predicted, str]:
    """What the planner says of a plan, and on what figures it rests."""
    found = task(run_file, settings)
    setting, cluster = found.setting, found.setting.cluster
    micro_batch, accumulate = found.file.batch.split(cluster.ranks)
    plan = found.file.plan.resolve(cluster, micro_batch=micro_batch, accumulate=accumulate)
    candidate = Candidate.of_plan(plan, setting.spec.layers)
    axes = place(candidate, cluster, setting.calibration)
    seconds, memory = step_time(setting, candidate, axes), peak_memory(setting, candidate, axes)
    told = Predicted(
        step_s=seconds.total,
        causes={cause: getattr(seconds, cause) for cause in CAUSES},
        sent=sent_bytes(setting, candidate, axes),
        states={state: getattr(memory, state) for state in own_runs.STATES},
        peak=memory.total - memory.framework,
    )
    return told, rests_on(setting)


def run(
    world: World, run_file: Path, settings: list[str], predicted: Predicted, options: argparse.Namespace
) -> Measured:
    """Train for about `--seconds`, at least three steps that count."""
    count = WARM_UP + max(3, min(40, round(options.seconds / predicted.step_s)))
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "run"
        chosen = [*settings, f"run.folder={folder}", f"run.steps={count}"]
        words = ["train", str(run_file), *(word for setting in chosen for word in ("--set", setting))]
        start(world, words, run_file.parent, train=True)
        begun = next(iter(read_events(folder / EVENTS_FILE, "run_start")))
        counted = [record for number, record in steps(folder / EVENTS_FILE).items() if number > WARM_UP]
    causes = {cause: statistics.fmean(r["seconds"][cause] for r in counted) for cause in counted[0]["seconds"]}
    seconds = tuple(record["step_s"] for record in counted)
    # The last step awaits all that is under way, and so has more bytes than its own.
    return Measured(seconds, causes, counted[0]["wire"], begun["held"])


def peak(world: World, run_file: Path, settings: list[str]) -> float:
    """The most bytes that rank 0's tensors take at once in a few steps on this host. Raises SystemExit if they fail."""
    with tempfile.TemporaryDirectory() as base:
        chosen = [*settings, f"run.folder={base}/run", f"run.steps={PEAK_STEPS}"]
        words = [PEAK_PROGRAM, base, "train", str(run_file), *(word for each in chosen for word in ("--set", each))]
        execute([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world.ranks), *words])
        return float((Path(base) / "0.json").read_text())


def measure(name: str, options: argparse.Namespace, folder: Path) -> tuple[list[Row], str]:
    """Repeats of: probe, predict every plan, let each of them run."""
    world = WORLDS[name]
    plans = {plan: each for plan, each in plans_of(world).items() if not options.plans or plan in options.plans}
    told: dict[str, list[Predicted]] = {plan: [] for plan in plans}
    seen: dict[str, list[Measured]] = {plan: [] for plan in plans}
    rests = ""
    for number in range(options.repeats):
        for plan, (predicted, measured, on) in repeat(name, plans, options, folder / str(number)).items():
            told[plan].append(predicted)
            seen[plan].append(measured)
            rests = on
    most = max(len(runs) for runs in seen.values())
    plans = {plan: settings for plan, settings in plans.items() if 0 < len(seen[plan]) == most}
    peaks = peaks_of(world, plans, options, folder) if options.peaks else {}
    return [Row(plan, tuple(told[plan]), tuple(seen[plan]), peaks.get(plan)) for plan in plans], rests


def repeat(
    name: str, plans: dict[str, list[str]], options: argparse.Namespace, folder: Path
) -> dict[str, tuple[Predicted, Measured, str]]:
    """Plan -> what was said of it, what it did, and what the first rests on; nothing if time was up before the end."""
    world, run_file = WORLDS[name], folder / "run.toml"
    folder.mkdir(parents=True, exist_ok=True)
    run_file.write_text(tomli_w.dumps(run_tree(world, options)))
    kept = made(folder / RUNS) if options.keep else {}
    if not (options.keep and (folder / "cluster.toml").exists()):
        if time.monotonic() > options.end_s:
            return {}
        start_s = time.monotonic()
        probe(world, folder, options)
        print(f"{name}: probed in {time.monotonic() - start_s:.0f} s", flush=True)
    told = {plan: predict(run_file, settings) for plan, settings in plans.items()}
    for plan, (predicted, _) in told.items():
        if plan in kept:
            continue
        if predicted.step_s > options.longest_s:
            print(f"{name}, {plan}: left out, a step is predicted to take {predicted.step_s:.1f} s", flush=True)
            continue
        if time.monotonic() > options.end_s:
            return {}
        kept[plan] = run(world, run_file, plans[plan], predicted, options)
        (folder / RUNS).write_text(json.dumps({key: asdict(each) for key, each in kept.items()}))
        ours_ms, theirs_ms = predicted.step_s * 1e3, kept[plan].step_s * 1e3
        print(f"{name}, {plan}: predicted {ours_ms:.1f} ms, measured {theirs_ms:.1f} ms", flush=True)
    return {plan: (predicted, kept[plan], on) for plan, (predicted, on) in told.items() if plan in kept}


def made(path: Path) -> dict[str, Measured]:
    """Runs of an earlier call, by plan."""
    if not path.exists():
        return {}
    told = json.loads(path.read_text())
    return {plan: Measured(**{**each, "steps_s": tuple(each["steps_s"])}) for plan, each in told.items()}


def peaks_of(world: World, plans: dict[str, list[str]], options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Plan -> peak bytes of rank 0."""
    path = folder / PEAKS
    found: dict[str, float] = json.loads(path.read_text()) if options.keep and path.exists() else {}
    for plan, settings in plans.items():
        if plan not in found and time.monotonic() < options.end_s:
            found[plan] = peak(world, folder / "0" / "run.toml", settings)
            path.write_text(json.dumps(found))
    return found


def report_of(found: dict[str, tuple[list[Row], str]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "benchmarks/predict_own_runs.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "kernel": platform.release()},
        "machine": f"{os.cpu_count()} cores",
        "options": {
            key: value for key, value in vars(options).items() if key not in ("out", "work", "end_s", "at_most_s")
        },
        "worlds": {
            name: {
                "rests_on": rests,
                "summary": asdict(own_runs.summary(rows)),
                "rows": [own_runs.as_json(row) for row in rows],
            }
            for name, (rows, rests) in found.items()
        },
    }


def write(found: dict[str, tuple[list[Row], str]], options: argparse.Namespace) -> None:
    """`own_runs.json` and `own_runs.md` in `--out`, if there is one."""
    if options.out is None:
        return
    report = report_of(found, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    parts = ["# Our own runs, predicted and measured"]
    for name, (rows, rests) in found.items():
        table = [own_runs.COLUMNS, ["---"] * len(own_runs.COLUMNS), *(own_runs.cells(row) for row in rows)]
        parts += [f"## {name}", "\n".join("| " + " | ".join(each) + " |" for each in table)]
        parts += [*own_runs.lines(own_runs.summary(rows)), f"It {rests}."]
    used = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    parts += [f"Command: `{report['command']}`", f"{report['date']}; {report['machine']}; {used}."]
    (options.out / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def show(name: str, rows: list[Row]) -> None:
    table = Table(*own_runs.COLUMNS, title=name, title_justify="left")
    for row in rows:
        table.add_row(*own_runs.cells(row))
    console = Console(width=max(130, Console().width))
    console.print(table)
    for line in own_runs.lines(own_runs.summary(rows)):
        console.print(line, soft_wrap=True)


def main() -> None:
    options = parse()
    found: dict[str, tuple[list[Row], str]] = {}
    with tempfile.TemporaryDirectory() as base:
        for name in options.worlds:
            if time.monotonic() > options.end_s:
                break
            rows, rests = measure(name, options, (options.work or Path(base)) / str(list(WORLDS).index(name)))
            if rows:
                found[name] = rows, rests
                show(name, rows)
                write(found, options)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    arguments.add_argument("--plans", nargs="*", default=[], help="these alone, by name")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=12, help="of the steps that count, in each repeat")
    arguments.add_argument("--longest-s", type=float, default=12, help="plans of longer predicted steps are left out")
    arguments.add_argument("--model", default="llama-3m")
    arguments.add_argument("--corpus", default="runs/corpora/stdlib")
    arguments.add_argument("--sequences", type=int, default=4, help="of a rank in a step")
    arguments.add_argument("--micro-batch", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--peaks", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    arguments.add_argument("--quick", action="store_true", help="a quick probe")
    arguments.add_argument("--work", type=Path, help="folder for run and cluster files; default: a temporary one")
    arguments.add_argument("--keep", action="store_true", help="add to what earlier calls probed and ran in --work")
    arguments.add_argument("--out", type=Path, help="folder for JSON and Markdown, say docs/benchmarks")
    arguments.add_argument("--at-most-s", type=float, default=float("inf"), help="start no probe or run after this")
    options = arguments.parse_args()
    options.end_s = time.monotonic() + options.at_most_s
    return options


if __name__ == "__main__":
    main()
