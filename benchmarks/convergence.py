"""Does coding cost loss? The demo model on 2 x 2 ranks under `auto`, the same tokens, one codec set after another.

Each run is `thinwire train` in full; the table has the validation loss on held-out library source and the bytes a rank
sent between the nodes per step, from the run's own ledger.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py --steps 500 --corpus runs/corpora/stdlib
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from thinwire.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

WIRES = {
    "fp32": "{}",
    "int8 both ways": "{weights={cluster='int8'}, grads={cluster='int8'}}",
    "int4 gradients, delta-int4 weights": "{weights={cluster='delta-int4'}, grads={cluster='int4'}}",
    "low-rank gradients (16), delta-int8 weights": "{weights={cluster='delta-int8'}, grads={cluster='lowrank'}, rank=16}",
    "int4 gradients, direct int4 weights": "{weights={cluster='int4'}, grads={cluster='int4'}}",
}


def settings(options: argparse.Namespace, folder: Path, wire: str) -> list[str]:
    chosen = {
        "run.folder": folder, "run.steps": options.steps, "run.eval_every": 0, "run.eval_sequences": 0,
        "run.sample_tokens": 0, "checkpoint.every_steps": 0, "data.path": options.corpus, "cluster.levels": "[2,2]",
        "batch.sequences": options.sequences, "batch.tokens": options.tokens, "batch.micro_batch": options.sequences // 4,
        "plan.partition": "auto", "plan.wire": wire, "run.seed": options.seed,
    }  # fmt: skip
    return [text for key, value in chosen.items() for text in ("--set", f"{key}={value}")]


def measure(options: argparse.Namespace, name: str) -> tuple[float, float]:
    """(validation loss after the last step, bytes rank 0 sent between nodes per step)."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "run"
        program = [sys.executable, "-c", "from thinwire.cli import main; main()", "train", options.run_file]
        subprocess.run([*program, *settings(options, folder, WIRES[name])], check=True, stdout=subprocess.DEVNULL)
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
    arguments.add_argument("--seed", type=int, default=1234)
    options = arguments.parse_args()
    table = Table("wire", "validation loss", "against fp32", "MB a step between nodes", "share")
    base: tuple[float, float] | None = None
    for name in WIRES:
        loss, sent = measure(options, name)
        base = base or (loss, sent)
        table.add_row(name, f"{loss:.4f}", f"{loss / base[0] - 1:+.2%}", f"{sent / 1e6:.3f}", f"{sent / base[1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
