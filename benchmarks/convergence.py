"""Does coding cost loss? The demo model on 2 x 2 ranks under `auto`, the same tokens, one codec set after another.

Each run is `thinwire train` in full; the table has the validation loss on held-out library source and the bytes a rank
sent between the nodes per step, from the run's own ledger.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py --steps 500 --seeds 1 2 3
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from train_runs import train

from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

WIRES = {
    "fp32": "{}",
    "int8 both ways": "{weights={cluster='int8'}, grads={cluster='int8'}}",
    "int4 gradients, delta-int4 weights": "{weights={cluster='delta-int4'}, grads={cluster='int4'}}",
    "low-rank gradients (16), delta-int8 weights": "{weights={cluster='delta-int8'}, grads={cluster='lowrank'}, rank=16}",
    "int4 gradients, direct int4 weights": "{weights={cluster='int4'}, grads={cluster='int4'}}",
}


def settings(options: argparse.Namespace, folder: Path, compression: str, seed: int) -> dict[str, Any]:
    return {
        "run.folder": folder, "run.steps": options.steps, "run.eval_every": 0, "run.eval_sequences": 0,
        "data.path": options.corpus, "cluster.levels": "[2,2]",
        "batch.sequences": options.sequences, "batch.tokens": options.tokens, "batch.micro_batch": options.sequences // 4,
        "plan.partition": "auto", "plan.compression": compression, "run.seed": seed,
    }  # fmt: skip


def measure(options: argparse.Namespace, name: str, seed: int) -> tuple[float, float]:
    """(validation loss after the last step, bytes rank 0 sent between nodes per step)."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "run"
        train(options.run_file, settings(options, folder, WIRES[name], seed))
        loss = [record["loss"] for record in read_events(folder / EVENTS_FILE, "eval")][-1]
        sent = [sum(record["wire"]["cluster"].values()) for record in steps(folder / EVENTS_FILE).values()]
        return loss, sent[-1]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--run-file", default="examples/stdlib.toml")
    arguments.add_argument("--corpus", default="runs/corpora/stdlib")
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--sequences", type=int, default=8)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1234])
    arguments.add_argument("--wires", nargs="+", choices=WIRES, default=list(WIRES), help="besides fp32, the base")
    options = arguments.parse_args()
    names = list(dict.fromkeys(["fp32", *options.wires]))
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in options.seeds:
        for name in names:
            seen[name].append(measure(options, name, seed))
            print(f"seed {seed}, {name}: validation loss {seen[name][-1][0]:.4f}", flush=True)
    Console().print(summary(seen))


def summary(seen: dict[str, list[tuple[float, float]]]) -> Table:
    """Per wire: the mean loss over the seeds, each seed's ratio to fp32 with the same seed, the bytes."""
    table = Table("wire", "validation loss", "against fp32, mean", "per seed", "MB a step between nodes", "share")
    base = seen["fp32"]
    for name, runs in seen.items():
        ratios = [loss / exact - 1 for (loss, _), (exact, _) in zip(runs, base, strict=True)]
        table.add_row(
            name,
            f"{statistics.mean(loss for loss, _ in runs):.4f}",
            f"{statistics.mean(ratios):+.2%}",
            "  ".join(f"{ratio:+.2%}" for ratio in ratios),
            f"{runs[0][1] / 1e6:.3f}",
            f"{runs[0][1] / base[0][1]:.3f}",
        )
    return table


if __name__ == "__main__":
    main()
