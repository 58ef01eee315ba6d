"""Everything that only a GPU can show, on one card in under eight minutes: a table, and `docs/benchmarks/gpu.md`.

    benchmarks/gpu_check.sh                        # WHEELS=FOLDER installs what a GPU image lacks, without a network
    benchmarks/gpu_check.sh --dry --out FILE       # every part end to end, tiny, on the CPU; speed is not judged

Parts: bits and speed of the codecs' kernels; loss and document attention against their references; steps beside FSDP2,
eager, compiled and with a vocabulary of 128,256; documents beside plain causal attention; a resumed run bit by bit;
`generate`; two ranks on one card; the probe's peak. A part that fails is a row of the table, and the others go on. The exit
status is 0 if every row is met, 1 if one is not, 2 without a GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from gpu_kernels import codec_rows, reference_rows
from gpu_rows import Row, page, show
from gpu_steps import corpus_in

from thinwire.checkpoint.pieces import newest_whole, read_tensors

HERE = Path(__file__).parent
VOCABULARY = 128_256
STEP_S, PEAK_GIB = 0.600, 71.5
"""Aims at that vocabulary, 8 x 4,096 tokens on an H200: seconds of a step, and the peak of FSDP2 there."""
Rows = Iterator[Row]


@dataclass(frozen=True)
class Check:
    """Where and how the parts run."""

    dry: bool
    work: Path
    end_s: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    def run(self, *command: str | Path, fails: str = "") -> str:
        """Standard output of a Python program. Raises RuntimeError with its last line, or if no time is left."""
        left_s = self.end_s - time.monotonic()
        if left_s < 5:
            raise RuntimeError("no time was left")
        environment = os.environ | ({"TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""} if self.dry else {})
        arguments = [sys.executable, *(str(part) for part in command)]
        try:
            done = subprocess.run(
                arguments, capture_output=True, text=True, timeout=left_s, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{Path(arguments[1]).name} took longer than the time that was left") from None
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1])
        return done.stdout

    def step(self, side: str, *more: str) -> dict[str, Any]:
        """What `gpu_steps.py` measures of one side."""
        dry = ("--dry", "--steps", "3") if self.dry else ()
        out = self.run(HERE / "gpu_steps.py", "--side", side, "--work", self.work, *more, *dry)
        made: dict[str, Any] = json.loads(out.splitlines()[-1])
        return made


def steps(check: Check) -> Rows:
    """Steps of both sides, one after the other; then documents beside the same run without."""
    plain: dict[str, float] = {}
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        ours, theirs = (check.step(side, *more) for side in ("thinwire", "fsdp2"))
        plain[name] = ours["step_s"]
        ratio = ours["step_s"] / theirs["step_s"]
        said = f"{1e3 * ours['step_s']:.0f} ms; FSDP2 {1e3 * theirs['step_s']:.0f}"
        yield Row("steps", f"{name}, vocabulary 257", said, "at most 1.02 of FSDP2's", ratio <= 1.02, speed=True)
    vocabulary = 500 if check.dry else VOCABULARY
    ours, theirs = (check.step(side, "--vocab", str(vocabulary)) for side in ("thinwire", "fsdp2"))
    said = f"{1e3 * ours['step_s']:.0f} ms; FSDP2 {1e3 * theirs['step_s']:.0f}"
    aim = f"at most {1e3 * STEP_S:.0f} ms and FSDP2's"
    fast = ours["step_s"] <= min(STEP_S, theirs["step_s"])
    yield Row("steps", f"eager, vocabulary {vocabulary:,}", said, aim, fast, speed=True)
    if ours["peak_gib"] is not None:
        said = f"{ours['peak_gib']:.1f} GiB; FSDP2 {theirs['peak_gib']:.1f}"
        below = ours["peak_gib"] < min(PEAK_GIB, theirs["peak_gib"])
        yield Row("steps", "peak at that vocabulary", said, f"below {PEAK_GIB} GiB and FSDP2's", below, speed=True)
    apart = check.step("thinwire", "--documents")["step_s"]
    said = f"{1e3 * apart:.0f} ms; plain causal {1e3 * plain['eager']:.0f}"
    yield Row(
        "steps", "short documents kept apart", said, "faster than plain causal", apart < plain["eager"], speed=True
    )


def run_file(check: Check, name: str, **sections: dict[str, Any]) -> Path:
    """A small run: its file. The run folder has the same name."""
    tree: dict[str, Any] = {
        "model": {"preset": "llama-1m"},
        "data": {"path": str(corpus_in(check.work, 40_000)), "cross_documents": False},
        "batch": {"sequences": 8, "tokens": 128, "micro_batch": 4},
        "schedule": {"warmup_steps": 1},
        "cluster": {"levels": [1], **({"device": "cpu"} if check.dry else {})},
        "checkpoint": {"every_steps": 2},
        "run": {"folder": str(check.work / name), "steps": 4, "sample_tokens": 8},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = check.work / f"{name}.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def losses(folder: Path) -> list[float]:
    """The loss of every step, the last time that it was taken."""
    records = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    by_step = {record["step"]: record["loss"] for record in records if "grad_norm" in record}
    return [by_step[step] for step in sorted(by_step)]


def resume(check: Check) -> Rows:
    """A run whose last checkpoint is gone takes its last steps again; their losses and the weights are the same bits."""
    path, folder = run_file(check, "resumed"), check.work / "resumed"
    check.run("-m", "thinwire", "train", path)
    first, states = losses(folder), newest(folder)
    shutil.rmtree(sorted((folder / "checkpoints").glob("step-*"))[-1])
    check.run("-m", "thinwire", "train", path)
    again, later = losses(folder), newest(folder)
    differ = sum(not torch.equal(states[name], later[name]) for name in states)
    said = f"losses {'equal' if again == first else 'differ'}, {differ} of {len(states)} tensors differ"
    yield Row("resume", "the last two of four steps again", said, "bit-identical", again == first and differ == 0)


def newest(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    path, manifest = newest_whole(folder / "checkpoints")
    return dict(read_tensors(path, manifest, ""))


def generate(check: Check) -> Rows:
    """From the run of `resume`."""
    text = check.run("-m", "thinwire", "generate", check.work / "resumed", "--prompt", "def ", "--tokens", "8")
    yield Row("generate", "eight tokens", repr(text.strip()[:40]), "some text", len(text.strip()) > 0)


def two_ranks(check: Check) -> Rows:
    """Weights and states cut over two ranks that share the card (on the CPU: the host) train like one rank."""
    shared = {} if check.dry else {"share_device": True}
    for ranks in (1, 2):
        more = {"cluster": {"levels": [ranks], **(shared if ranks > 1 else {})}, "plan": {"partition": "zero3"}}
        if ranks == 1:
            del more["plan"]
        check.run("-m", "thinwire", "train", run_file(check, f"ranks-{ranks}", **more, run={"steps": 3}))
    one, two = (losses(check.work / f"ranks-{ranks}") for ranks in (1, 2))
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    name = "two ranks on one " + ("host" if check.dry else "card")
    yield Row(name, "ZeRO-3 beside one rank", f"losses within {worst:.1e}", "within 1e-4", worst <= 1e-4)


def probe(check: Check) -> Rows:
    """What a quick probe says the chip does, beside one large product measured here."""
    out = check.work / "cluster.toml"
    device = ("--device", "cpu") if check.dry else ()
    check.run("-m", "thinwire", "probe", "--quick", "--levels", "node=1", *device, "-o", out)
    peak = tomllib.loads(out.read_text())["device"]["peak_flops_per_s"]
    own = product_flops(check)
    said = f"{peak / 1e12:.2f} TFLOP/s; a large product here {own / 1e12:.2f}"
    yield Row("probe", "peak of --quick", said, "at least 0.9 of that product", peak >= 0.9 * own, speed=True)


def product_flops(check: Check) -> float:
    """FLOP/s of the best of ten large bf16 products (fp32 on a CPU)."""
    n = 256 if check.dry else 8192
    dtype = torch.float32 if check.dry else torch.bfloat16
    a, b = (torch.randn(n, n, device=check.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start_s = time.perf_counter()
        torch.mm(a, b)
        if not check.dry:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start_s)
    return 2.0 * n**3 / best


PARTS: dict[str, Callable[[Check], Rows]] = {
    "kernels": lambda check: codec_rows(check.device, dry=check.dry),
    "references": lambda check: reference_rows(check.device, dry=check.dry),
    "steps": steps,
    "resume": resume,
    "generate": generate,
    "two ranks": two_ranks,
    "probe": probe,
}


def rows_of(check: Check, parts: list[str]) -> list[Row]:
    """The rows of all parts; a part that raises has one that says what."""
    rows: list[Row] = []
    for name in parts:
        start_s = time.monotonic()
        try:
            rows.extend(PARTS[name](check))
        except Exception as error:  # whatever it is, the other parts are still worth knowing
            rows.append(Row(name, "failed", " ".join(str(error).split())[:200] or type(error).__name__, "", False))
        print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dry", action="store_true", help="every part, tiny, on the CPU")
    arguments.add_argument("--out", type=Path, default=None, help="default: docs/benchmarks/gpu.md; none with --dry")
    arguments.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--minutes", type=float, default=8.0)
    options = arguments.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no GPU here; --dry runs every part on the CPU", file=sys.stderr)
        return 2
    out = options.out or (None if options.dry else HERE.parent / "docs" / "benchmarks" / "gpu.md")
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        rows = rows_of(Check(options.dry, Path(work), start_s + 60 * options.minutes), options.parts)
    took_s = time.monotonic() - start_s
    show(rows, dry=options.dry)
    if out is not None:
        out.write_text(page(rows, dry=options.dry, seconds=took_s))
    return 0 if all(row.met or (row.speed and options.dry) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
