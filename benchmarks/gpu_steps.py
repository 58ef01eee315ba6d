"""One side's optimizer steps on one device: seconds in the median, peak memory, loss. A line of JSON on stdout.

    python benchmarks/gpu_steps.py --side fsdp2 --vocab 128256 --work FOLDER

`thinwire` is the training loop's own step with everything it does each step. `fsdp2` is what one writes with torch alone:
`fully_shard` for every block and the root, bf16 parameters, fp32 reductions, cross entropy of fp32 logits, clipping and
fused AdamW. Both train the same model on the same batches: short documents, packed. `gpu_check.py` runs this file once for
each row, so that a peak is one side's own.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from loop_overhead import Ours

from thinwire.config import build
from thinwire.data.loader import Loader, Packing
from thinwire.data.prepare import Options, prepare
from thinwire.model.transformer import Transformer
from thinwire.train.config import RunConfig
from thinwire.train.job import Job, resolve

LARGE = {"hidden": 2048, "layers": 16, "heads": 16, "kv_heads": 8, "ffn": 8192, "max_tokens": 4096}
SMALL = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "max_tokens": 64}
WARM_UP = 4
"""Steps that are not counted: compiling, choosing kernels, filling the allocator."""
DOCUMENT_WORDS = 60


def corpus_in(folder: Path, tokens: int) -> Path:
    """A corpus of at least so many tokens in documents of some 400 bytes; made once."""
    if not (folder / "corpus").exists():
        draw, words = random.Random(0), ("def", "return", "class", "import", "value", "yield", "assert", "with")
        (folder / "text").mkdir(parents=True, exist_ok=True)
        made, number = 0, 0
        while made < tokens:
            text = " ".join(draw.choice(words) for _ in range(draw.randint(1, 2 * DOCUMENT_WORDS))) + "\n"
            (folder / "text" / f"{number:05d}.txt").write_text(text)
            made, number = made + len(text), number + 1
        prepare(Options((str(folder / "text"),), "bytes"), folder / "corpus", workers=1)
    return folder / "corpus"


def job_of(options: argparse.Namespace) -> Job:
    """What thinwire trains: the 1.0 B Llama at 8 x 4,096 tokens, or (`--dry`) a toy at 4 x 64."""
    sequences, tokens, micro = (4, 64, 2) if options.dry else (8, 4096, 4)
    corpus = corpus_in(options.work, (options.steps + 2) * sequences * tokens)
    shape = SMALL if options.dry else LARGE
    tree = {
        "model": {"family": "llama", "tied": True, "vocab_size": options.vocab, **shape},
        "data": {"path": str(corpus), "cross_documents": not options.documents},
        "batch": {"sequences": sequences, "tokens": tokens, "micro_batch": micro},
        "schedule": {"warmup_steps": 2},
        "plan": {"compute_dtype": "bf16"},
        "checkpoint": {"every_steps": 0},
        "run": {
            "folder": str(options.work / f"run-{os.getpid()}"), "steps": options.steps, "log_every": 10_000,
            "compile": options.compile,
        },
    }  # fmt: skip
    tree["cluster"] = {"levels": [1], **({"device": "cpu"} if options.dry else {})}
    return resolve(options.work / "run.toml", build(RunConfig, tree, "benchmark"))


class Fsdp2:
    """The same steps by torch's own means."""

    def __init__(self, job: Job, *, device: torch.device, compiled: bool) -> None:
        from torch.distributed import HashStore, init_process_group
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=HashStore())
        self.model, self.device, self.done = Transformer(job.spec).to(device), device, 0
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = torch.distributed.init_device_mesh(device.type, (1,))
        for block in self.model.blocks:
            if compiled:
                block.forward = torch.compile(block.forward)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        batch = job.config.batch
        loader = Loader(Packing(job.corpus.train, batch.tokens), batch_sequences=batch.sequences, seed=0)
        self.steps = [
            loader.micro_batches(step, rank=0, ranks=1, micro_batch=job.plan.micro_batch)
            for step in range(job.config.run.steps)
        ]
        self.tokens, self.loss = batch.sequences * batch.tokens, 0.0

    def step(self) -> None:
        total = torch.zeros((), device=self.device)
        for batch in self.steps[self.done]:
            tokens, targets = (torch.from_numpy(x).to(self.device) for x in (batch.tokens_BT, batch.targets_BT))
            logits = self.model(tokens).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / self.tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss, self.done = float(total), self.done + 1


def seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--side", choices=["thinwire", "fsdp2"], required=True)
    arguments.add_argument("--vocab", type=int, default=257)
    arguments.add_argument("--documents", action="store_true", help="attention stays inside documents")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--steps", type=int, default=14)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--dry", action="store_true", help="a toy on the CPU")
    options = arguments.parse_args()
    device = torch.device("cpu" if options.dry else "cuda", None if options.dry else 0)
    job = job_of(options)
    if options.side == "thinwire":
        ours = Ours(job)
        step: Callable[[], None] = ours.step
    else:
        theirs = Fsdp2(job, device=device, compiled=options.compile)
        step = theirs.step
    times = [seconds(step, device) for _ in range(options.steps)]
    if options.side == "thinwire":
        ours.close()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    made = {"step_s": statistics.median(times[min(WARM_UP, options.steps - 1) :]), "peak_gib": peak}
    print(json.dumps(made), flush=True)
    os._exit(0)  # without waiting for threads of the process group


if __name__ == "__main__":
    main()
