"""Out of memory is one sentence with its figures and the setting that would fit: with real limits, and as CUDA says it."""

import errno
import re
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import command, environment, make_corpus, make_text, thinwire, write_run
from thinwire.cli.train import advice, milder, predicted_bytes
from thinwire.config import load
from thinwire.data.prepare import Options, prepare
from thinwire.errors import ShortOfMemory
from thinwire.model.spec import ModelSpec
from thinwire.train.config import RunConfig
from thinwire.train.job import Job, resolve
from thinwire.train.shortage import asked_bytes, shortage_explained

GIB = 2**30
LIMIT = 12 * GIB
"""Of address space: torch itself reserves some of it."""
WIDE = {"ffn": 65_536}
HUGE = {"model": WIDE, "batch": {"sequences": 1024, "tokens": 64, "micro_batch": 512}}
"""512 x 64 x (2 x 65,536) numbers of a feed-forward layer take 16 GiB in fp32."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def _limited(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))

    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=limit,
        timeout=240,
        check=False,
    )


def test_a_rank_that_runs_out_of_memory_says_what_fits_and_what_it_says_fits(corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, run={"steps": 1, "eval_sequences": 1}, schedule={"warmup_steps": 0}, **HUGE)
    done = _limited("train", run)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"thinwire: rank 0: out of memory on the host: it held [\d.]+ [MG]iB of [\d.]+ GiB.* \(states of the plan: .*"
        r"optimizer .*, and asked for 16 GiB more; batch\.micro_batch = \d+ would fit: [\d.]+ GiB of [\d.]+ GiB$",
        said,
    ), said
    assert "Traceback" not in done.stderr
    fitting = re.search(r"batch\.micro_batch = (\d+)", said)
    assert fitting is not None
    assert 1 < int(fitting[1]) < 512
    job = _job(run, corpus)
    assert isinstance(job.spec, ModelSpec)
    capacity = float(re.findall(r"([\d.]+) GiB$", said)[0]) * GIB
    sizes = {other.micro_batch: predicted_bytes(job, job.spec, other) for words, other in milder(job.plan)
             if words == f"batch.micro_batch = {other.micro_batch}"}  # fmt: skip
    chosen = int(fitting[1])
    assert sizes[chosen] <= 1.01 * capacity < sizes[2 * chosen]


@pytest.mark.slow
def test_a_limited_eval_says_so_too(corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, run={"steps": 1, "eval_sequences": 1}, schedule={"warmup_steps": 0},
                    model=WIDE, batch={"sequences": 2, "tokens": 64, "micro_batch": 2})  # fmt: skip
    assert thinwire("train", run).returncode == 0
    prepare(Options((str(make_text(tmp_path / "long", 1000)),), "bytes", validation_fraction=0.1), tmp_path / "more")
    done = _limited("eval", tmp_path / "run", "--data", tmp_path / "more", "--batch", "4096", "--device", "cpu")
    assert done.returncode == 1, done.stderr
    assert re.match(r"thinwire: out of memory on the host: .*; give a smaller --batch$", done.stderr)
    assert len(done.stderr.splitlines()) == 1


def _job(run: Path, corpus: Path, *settings: str) -> Job:
    return resolve(run, load(RunConfig, run, settings))


def _raise(error: BaseException, held: dict[str, int] | None = None, device: str = "cpu") -> ShortOfMemory:
    with pytest.raises(ShortOfMemory) as raised, shortage_explained(torch.device(device)) as states:
        states.update(held or {})
        raise error
    return raised.value


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 31.31 GiB. GPU 0 has a total capacity of 139.80 GiB of which 20.23 GiB is free. "
    "Including non-PyTorch memory, this process has 119.57 GiB memory in use. Of the allocated memory 118.04 GiB is held"
)


def test_what_cuda_says_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {
        "memory_allocated": lambda device: 118 * GIB,
        "max_memory_allocated": lambda device: 125 * GIB,
        "get_device_properties": lambda device: type("Card", (), {"total_memory": 140 * GIB}),
        "get_device_name": lambda device: "NVIDIA H200",
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    error = _raise(torch.OutOfMemoryError(CUDA_SAYS), {"params": 2 * GIB, "grads": 0, "optimizer": 12 * GIB}, "cuda:0")
    assert str(error) == (
        "out of memory on NVIDIA H200: it held 118 GiB of 140 GiB, at most 125 GiB before (states of the plan: params 2 GiB,"
        " optimizer 12 GiB; the rest activations, gradients on their way and the runtime), and asked for 31.3 GiB more"
    )
    assert (error.exit_status, error.capacity_bytes) == (1, 140 * GIB)
    assert error.needed_bytes == pytest.approx(149.31 * GIB)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), 0),
        (MemoryError("Unable to allocate 3.50 GiB for an array with shape (5, 7) and data type int64"), 3.5 * GIB),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                      "to allocate 26214400000 bytes. Error code 12 (Cannot allocate memory)"), 26214400000),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 0),
        (RuntimeError("CUDA error: out of memory"), 0),
    ],
)  # fmt: skip
def test_every_way_of_saying_so_is_known(error: BaseException, asked: float) -> None:
    told = _raise(error)
    assert asked_bytes(str(error)) == asked
    assert ("asked for" in str(told)) == bool(asked)
    assert told.needed_bytes >= asked
    assert told.capacity_bytes > 0


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device")])
def test_other_errors_are_left_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, shortage_explained(torch.device("cpu")):
        raise error
    assert raised.value is error


def _advised(corpus: Path, tmp_path: Path, room: float, **sections: dict[str, Any]) -> str:
    """Advice where `room` is this share of what the run is predicted to need."""
    run = write_run(tmp_path, corpus, **sections)
    job = _job(run, corpus)
    assert isinstance(job.spec, ModelSpec)
    needed = predicted_bytes(job, job.spec, job.plan)
    return advice(job, needed, room * needed)


LARGE = {"hidden": 2048, "ffn": 8192, "heads": 16, "layers": 8, "max_tokens": 4096}


def test_the_mildest_change_that_fits_is_named(corpus: Path, tmp_path: Path) -> None:
    sections = {"model": LARGE, "batch": {"sequences": 8, "tokens": 1024, "micro_batch": 4}, "cluster": {"levels": [2]},
                "plan": {"partition": "ddp"}}  # fmt: skip
    assert _advised(corpus, tmp_path, 0.95, **sections).startswith("batch.micro_batch = 2 would fit: ")
    one = {**sections, "batch": {"sequences": 8, "tokens": 1024, "micro_batch": 1}}
    assert re.match(
        r"plan\.(recompute = 'full'|partition = 'zero1') would fit: ", _advised(corpus, tmp_path, 0.9, **one)
    )
    least = {**one, "plan": {"partition": "ddp", "recompute": "full"}}
    assert _advised(corpus, tmp_path, 0.88, **least).startswith("plan.partition = 'zero1' would fit: ")
    assert "no smaller micro-batch, recomputation or partition" in _advised(corpus, tmp_path, 0.01, **least)


def test_what_was_seen_beyond_the_formula_counts(corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, model=LARGE, batch={"sequences": 8, "tokens": 1024, "micro_batch": 8})
    job = _job(run, corpus)
    assert isinstance(job.spec, ModelSpec)
    needed = predicted_bytes(job, job.spec, job.plan)
    sizes = [
        int(re.findall(r"micro_batch = (\d+)", advice(job, seen * needed, 0.9 * needed))[0]) for seen in (1.0, 1.8)
    ]
    assert sizes[0] > sizes[1]
