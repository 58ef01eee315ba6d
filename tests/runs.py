"""Small runs for tests: a corpus of made-up text, run files, the command line in a process of its own."""

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from thinwire.cli import main
from thinwire.comm.world import World
from thinwire.config import build
from thinwire.data.prepare import Options, prepare
from thinwire.files.events import read_events
from thinwire.train.config import RunConfig
from thinwire.train.folder import EVENTS_FILE, open_folder
from thinwire.train.job import resolve
from thinwire.train.stop import StopRequest
from thinwire.train.worker import train_job
from warm import Started, rank_name

_STARTS_NO_RANKS = ("data", "eval", "export", "generate", "import", "plan", "simulate")

_WORDS = (
    *("def", "return", "class", "import", "self", "value", "for", "in", "if", "else", "while", "yield"),
    *("raise", "assert", "with", "as", "not", "and", "or"),
)
CUDA = {"cluster": {"device": {"name": "h100", "kind": "cuda"}, "levels": [8, 4]},
        "batch": {"sequences": 32, "micro_batch": 1}}  # fmt: skip
"""Sections of a run on four nodes of eight GPUs."""


def make_text(folder: Path, documents: int = 60, *, seed: int = 0) -> Path:
    """`documents` files of a few hundred bytes of random words."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = [draw.choice(_WORDS) for _ in range(draw.randint(20, 120))]
        (folder / f"{number:04d}.txt").write_text(" ".join(words) + "\n")
    return folder


def make_corpus(folder: Path, *, tokenizer: str = "bytes") -> Path:
    """A prepared corpus of about 20 kB."""
    options = Options((str(make_text(folder / "text")),), tokenizer, heldout_fraction=0.1)
    prepare(options, folder / "corpus", workers=1)
    return folder / "corpus"


def run_tree(folder: Path, corpus: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run file's contents for a model of some 20 thousand parameters."""
    tree: dict[str, Any] = {
        "model": {
            "preset": "llama-1m",
            "hidden": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "ffn": 64,
            "max_tokens": 64,
        },
        "data": {"path": str(corpus)},
        "batch": {"sequences": 16, "tokens": 32, "micro_batch": 4},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "cluster": {"levels": [1], "device": "cpu"},
        "checkpoint": {"every_steps": 5},
        "run": {"folder": str(folder), "steps": 20, "eval_every": 0, "sample_tokens": 0},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def write_run(folder: Path, corpus: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """The run file `folder/NAME.toml`, whose run folder is `folder/NAME`."""
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(run_tree(folder / name, corpus, **sections)))
    return path


def thinwire(
    *arguments: str | Path, cwd: Path | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end: in a process of its own if it may start ranks, else in this one; torch is loaded."""
    if arguments and arguments[0] in _STARTS_NO_RANKS:
        return here([str(argument) for argument in arguments], cwd or Path.cwd())
    return ended(warm(*arguments, env=environment(), cwd=cwd), timeout_s)


def warm(*arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None, merged: bool = False) -> Started:
    """Start the command line from a server that has torch loaded and return at once."""
    return Started([str(argument) for argument in arguments], env=env, cwd=cwd or Path.cwd(), merged=merged)


def ended(process: Started, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a start; kills it if that does not come."""
    try:
        out, err = process.communicate(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def here(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line to its end in this process; it must start no others."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def start(*arguments: str | Path, **variables: str) -> Started:
    """Start the command line, with torch loaded, and return at once."""
    return warm(*arguments, env={**environment(), **variables}, merged=True)


def start_anew(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """The same as a shell does it: every process imports what it needs."""
    own = {**environment(), **variables}
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from thinwire.cli import main; main()", *map(str, arguments)]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def wait_for_step(folder: Path, step: int, timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    path = folder / EVENTS_FILE
    while time.monotonic() < end_s:
        if path.exists() and any(record["step"] >= step for record in read_events(path, "step")):
            return
        time.sleep(0.01)
    raise TimeoutError(f"{folder} did not reach step {step}")


def ranks_of(process: Started | subprocess.Popen[str]) -> list[int]:
    """The process ids of a launcher's ranks, by rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                name, line = (entry / "comm").read_text().strip(), (entry / "cmdline").read_bytes().decode()
            except (OSError, IndexError):
                continue
            name = rank_name(line) if '"rank": ' in line else name
            if parent == str(process.pid) and name.startswith("rank "):
                found.append((int(name.removeprefix("rank ")), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def train_in(world: World, tree: dict[str, Any]) -> None:
    """Be a rank of the run that `tree` describes; rank 0 makes its folder."""
    job = resolve(Path("run.toml"), build(RunConfig, tree, "run.toml"))
    if world.rank == 0:
        open_folder(job, fresh=False)
    train_job(job, world, StopRequest())
