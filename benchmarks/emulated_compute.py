"""Does emulated compute take the time that the planner says, and the real run not, where ranks share cores?

Hosts and ranks (2x2: two hosts of two), link rates and plans. A probe of each world gives the figures of this machine's
links and of its own compute. Then every plan runs on the lab twice, with real compute and with compute that sleeps the
seconds of that probe, and `simulate_step` says what each should take. What the probe found that compute and transfers take
from each other (`overlap_slowdown`, and `behind` of levels that go over links) counts for the real run alone: a rank that
sleeps takes nothing from a transfer.

    OMP_NUM_THREADS=1 python benchmarks/emulated_compute.py --worlds 2x2 4x1 --rates 100 1000 --steps 12
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tomli_w
from predict_own_runs import THINWIRE, execute
from rich.console import Console
from rich.table import Table

from thinwire.cli.emulated import factors
from thinwire.cli.plan import task
from thinwire.cluster.cluster import Calibration, Cluster
from thinwire.cluster.hardware import calibration_of
from thinwire.files.events import steps
from thinwire.predict.candidate import Candidate
from thinwire.predict.perturbation import Perturbation
from thinwire.predict.placement import place
from thinwire.predict.simulate import simulate_step
from thinwire.train.folder import EVENTS_FILE

WARM_UP = 2
"""Steps that do not count: orders of reduction and connections are made in them."""
SIDES = ("real", "emulated")


@dataclass(frozen=True)
class World:
    """Hosts, ranks of each, and the rate of a host's uplink."""

    hosts: int
    ranks_per_host: int
    mbit_per_s: float

    @property
    def levels(self) -> str:
        """As `thinwire probe` takes them."""
        inside = f"node={self.ranks_per_host}," if self.ranks_per_host > 1 else ""
        return f"{inside}cluster={self.hosts}"

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    def __str__(self) -> str:
        return f"{self.hosts} hosts x {self.ranks_per_host}, {self.mbit_per_s:g} Mbit/s"


@dataclass(frozen=True)
class Row:
    """One plan in one world: of each side the median step, and what is predicted of it."""

    world: str
    plan: str
    real_predicted_s: float
    real_s: float
    emulated_predicted_s: float
    emulated_s: float
    emulated_spread: float
    """Half of the range between the quartiles of its steps, over the median."""


def write(world: World, folder: Path, options: argparse.Namespace) -> None:
    """The lab and the run file of a world, for the `cluster.toml` that a probe makes beside them."""
    lab = {"hosts": world.hosts, "ranks_per_host": world.ranks_per_host, "host_rate": f"{world.mbit_per_s:g} Mbit/s"}
    (folder / "lab.toml").write_text(tomli_w.dumps(lab))
    batch = {"sequences": options.sequences * world.ranks, "tokens": options.tokens}
    run = {
        "model": {"preset": options.model}, "data": {"path": str(options.corpus.absolute())},
        "batch": {**batch, "micro_batch": options.micro_batch}, "cluster": {"file": "cluster.toml"},
        "schedule": {"warmup_steps": 1}, "checkpoint": {"every_steps": 0},
        "run": {"eval_every": 0, "eval_sequences": 1, "sample_tokens": 0, "steps": WARM_UP + options.steps},
    }  # fmt: skip
    (folder / "run.toml").write_text(tomli_w.dumps(run))


def probe(world: World, folder: Path) -> None:
    words = [*THINWIRE, "probe", "--levels", world.levels, "-o", str(folder / "cluster.toml"), "--quick"]
    execute([*THINWIRE, "lab", "run", str(folder / "lab.toml"), "--out", str(folder / "probe"), "--", *words])


def apart(cluster: Cluster, calibration: Calibration) -> Cluster:
    """The cluster if compute and transfers over links took nothing from each other."""
    levels = (level.model_copy(update={"behind": 1.0}) if level.behind > 0 else level for level in cluster.levels)
    calm = calibration.model_copy(update={"overlap_slowdown": 0.0})
    return cluster.model_copy(update={"levels": tuple(levels), "calibration": calm})


def predict(folder: Path, partition: str, side: str, slow: list[str]) -> float:
    """Seconds of a simulated step; emulated, of ranks that are `slow` too."""
    found = task(folder / "run.toml", [f"plan.partition={partition}"])
    cluster, emulated = found.setting.cluster, side == "emulated"
    if emulated:
        cluster = apart(cluster, found.setting.calibration)
    calibration = calibration_of(cluster)
    setting = replace(found.setting, cluster=cluster, calibration=calibration)
    micro_batch, accumulate = found.file.batch.split(cluster.ranks)
    plan = found.file.plan.resolve(cluster, micro_batch=micro_batch, accumulate=accumulate)
    candidate = Candidate.of_plan(plan, setting.spec.layers)
    each = enumerate(factors(slow, cluster.ranks) if emulated else ())
    late = Perturbation({(rank, 0): factor for rank, factor in each if factor != 1})
    return simulate_step(setting, candidate, place(candidate, cluster, calibration), late, keep_spans=False).step_s


def measure(folder: Path, partition: str, side: str, slow: list[str]) -> list[float]:
    """Seconds of every step that counts. Nothing makes a rank of the real side slow."""
    with tempfile.TemporaryDirectory() as base:
        chosen = [f"plan.partition={partition}", f"run.folder={base}/run"]
        words = [word for setting in chosen for word in ("--set", setting)]
        lab = [*THINWIRE, "lab", "run", str(folder / "lab.toml"), "--train", str(folder / "run.toml")]
        words += [word for each in slow if side == "emulated" for word in ("--slow", each)]
        execute([*lab, "--compute", side, *words])
        recorded = steps(Path(base) / "run" / EVENTS_FILE)
    return [record["step_s"] for number, record in sorted(recorded.items()) if number > WARM_UP]


def compare(world: World, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Every plan of one world; the sides take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    write(world, folder, options)
    start_s = time.monotonic()
    if not (options.keep and (folder / "cluster.toml").exists()):
        probe(world, folder)
    print(f"{world}: probed in {time.monotonic() - start_s:.0f} s", flush=True)
    seen: dict[str, dict[str, list[float]]] = {plan: {side: [] for side in SIDES} for plan in options.plans}
    for number in range(options.repeats):
        for plan in options.plans:
            for side in SIDES if number % 2 else SIDES[::-1]:
                if side in options.sides:
                    seen[plan][side] += measure(folder, plan, side, options.slow)
    rows = []
    for plan, sides in seen.items():
        median_s = {side: statistics.median(each) if each else float("nan") for side, each in sides.items()}
        quarters = statistics.quantiles(sides["emulated"], n=4)
        spread = (quarters[2] - quarters[0]) / 2 / median_s["emulated"]
        told_s = {side: predict(folder, plan, side, options.slow) for side in SIDES}
        both = [seconds for side in SIDES for seconds in (told_s[side], median_s[side])]
        rows.append(Row(str(world), plan, *both, spread))
        print(rows[-1], flush=True)
    return rows


def show(rows: list[Row]) -> None:
    columns = ("plan", "emulated", "predicted", "ratio", "steps ±", "real", "predicted", "ratio")
    table = Table("world", *columns, title="seconds of a step")
    for row in rows:
        cells = {side: _cells(getattr(row, f"{side}_s"), getattr(row, f"{side}_predicted_s")) for side in SIDES}
        table.add_row(row.world, row.plan, *cells["emulated"], f"{row.emulated_spread:.1%}", *cells["real"])
    console = Console(width=120)
    console.print(table)
    for side in SIDES:
        ratios = [getattr(row, f"{side}_s") / getattr(row, f"{side}_predicted_s") for row in rows]
        off = [abs(ratio - 1) for ratio in ratios if not math.isnan(ratio)]
        if off:
            console.print(
                f"{side}: off the prediction by {statistics.median(off):.1%} at the median, {max(off):.1%} at most"
            )


def _cells(measured_s: float, predicted_s: float) -> list[str]:
    if math.isnan(measured_s):
        return ["-", f"{predicted_s:.3f}", "-"]
    return [f"{measured_s:.3f}", f"{predicted_s:.3f}", f"{measured_s / predicted_s:.3f}"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--worlds", nargs="+", default=["2x2", "4x1"], help="HOSTSxRANKS, such as 2x2")
    arguments.add_argument("--rates", type=float, nargs="+", default=[100, 1000], help="Mbit/s of a host's uplink")
    arguments.add_argument("--plans", nargs="+", default=["ddp", "zero1", "zero3", "auto"])
    arguments.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="emulated at least")
    arguments.add_argument("--slow", nargs="*", default=[], help="RANK=FACTOR, of the emulated side and the prediction")
    arguments.add_argument("--steps", type=int, default=12, help="that count, of each run")
    arguments.add_argument("--repeats", type=int, default=1, help="runs of each side")
    arguments.add_argument("--model", default="llama-3m")
    arguments.add_argument("--corpus", type=Path, default=Path("runs/corpora/stdlib"))
    arguments.add_argument("--sequences", type=int, default=4, help="of a rank in a step")
    arguments.add_argument("--micro-batch", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--work", type=Path, help="keep probes and run files there")
    arguments.add_argument("--keep", action="store_true", help="with --work: take the probes that are there")
    arguments.add_argument("--out", type=Path, help="a JSON file of the rows")
    options = arguments.parse_args()
    if "emulated" not in options.sides:
        arguments.error("--sides without emulated shows nothing of it")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as base:
        for name in options.worlds:
            hosts, ranks = map(int, name.split("x"))
            for rate in options.rates:
                folder = (options.work or Path(base)) / f"{name}-{rate:g}"
                rows += compare(World(hosts, ranks, rate), options, folder)
                if options.out is not None:
                    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    show(rows)


if __name__ == "__main__":
    main()
