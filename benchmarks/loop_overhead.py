"""tokens/s of the training loop against the same model in a bare PyTorch loop, alternating in one process.

Both sides see the same batches, prepared beforehand by the loader, run the same model, loss, clipping and AdamW, on one
rank; start-up is left out. The thinwire side is `train_step` with everything it does each step: data feed, engine,
ledger, clock, records to events.jsonl and TensorBoard, checkpoint bookkeeping.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from thinwire.comm.world import World
from thinwire.config import build
from thinwire.data.loader import Loader, Packing
from thinwire.data.prepare import Options, prepare
from thinwire.model.transformer import Transformer
from thinwire.train.assemble import assemble
from thinwire.train.clock import StepClock
from thinwire.train.config import RunConfig
from thinwire.train.folder import open_folder
from thinwire.train.job import Job, resolve
from thinwire.train.loop import close_record, train_step
from thinwire.train.parts import Parts
from thinwire.train.saving import Saver
from thinwire.train.stop import StopRequest

SEQUENCES, TOKENS, MICRO_BATCH = 8, 256, 4


def job_in(folder: Path) -> Job:
    prepare(Options(("stdlib",)), folder / "corpus", workers=1)
    tree = {
        "model": {"preset": "llama-3m"},
        "data": {"path": str(folder / "corpus")},
        "batch": {"sequences": SEQUENCES, "tokens": TOKENS, "micro_batch": MICRO_BATCH},
        "checkpoint": {"every_steps": 0},
        "run": {"folder": str(folder / "run"), "steps": 10_000, "log_every": 10_000},
    }
    return resolve(folder / "run.toml", build(RunConfig, tree, "benchmark"))


class Ours:
    """The loop of thinwire, one step at a time."""

    def __init__(self, job: Job) -> None:
        open_folder(job, fresh=False)
        world = World.join(job.cluster, rank=0, size=1, local_rank=0, host="", port=0)
        self.job, self.parts, self.stop = job, assemble(job, world), StopRequest()
        parts = self.parts
        self.saver = Saver(job, parts.checkpoints, parts.sharded, parts.optimizer, parts.sync, parts.reporter)
        self.clock, self.done = StepClock(world.device), 0
        self.parts.begin(0)

    def step(self) -> None:
        self.clock.start()
        record, _ = train_step(self.job, self.parts, self.done, self.clock, self.stop)
        self.done += 1
        self.saver.after_step(self.done, last=False)
        self.clock.lap("checkpoint")
        close_record(self.job, self.parts, record, self.clock)

    def close(self) -> Parts:
        self.parts.close()
        return self.parts


class Bare:
    """What one writes in a notebook: fused AdamW, clipping, accumulation, batches at hand."""

    def __init__(self, job: Job, steps: int) -> None:
        self.model = Transformer(job.spec)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        loader = Loader(Packing(job.corpus.train, TOKENS), batch_sequences=SEQUENCES, seed=0)
        self.batches = [loader.micro_batches(s, rank=0, ranks=1, micro_batch=MICRO_BATCH) for s in range(steps)]
        self.done = 0

    def step(self) -> None:
        micro_batches = self.batches[self.done % len(self.batches)]
        for batch in micro_batches:
            logits = self.model(torch.from_numpy(batch.tokens_BT))
            targets = torch.from_numpy(batch.targets_BT).view(-1)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets) / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def tokens_per_s(side: Ours | Bare, steps: int) -> float:
    start_s = time.perf_counter()
    for _ in range(steps):
        side.step()
    return steps * SEQUENCES * TOKENS / (time.perf_counter() - start_s)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=8, help="steps of one side in a round")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = job_in(Path(folder))
        ours, bare = Ours(job), Bare(job, options.steps)
        for side in (ours, bare):
            tokens_per_s(side, 2)
        pairs = []
        for number in range(options.rounds):
            order = (ours, bare) if number % 2 == 0 else (bare, ours)
            speed = {id(side): tokens_per_s(side, options.steps) for side in order}
            pairs.append((speed[id(ours)], speed[id(bare)]))
        ours.close()
    table = Table("round", "thinwire tokens/s", "bare loop tokens/s", "ratio")
    for number, (mine, theirs) in enumerate(pairs, 1):
        table.add_row(str(number), f"{mine:,.0f}", f"{theirs:,.0f}", f"{mine / theirs:.3f}")
    table.add_row("median", "", "", f"{statistics.median(mine / theirs for mine, theirs in pairs):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
