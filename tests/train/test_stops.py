"""However a run stops, it loses nothing that it had committed and goes on with the same numbers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import command, environment, make_corpus, ranks_of, start, start_anew, thinwire, wait_for_step, write_run
from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

CLUSTER = {"levels": [2]}
RUN = {"steps": 30, "eval_every": 0, "sample_tokens": 0, "eval_sequences": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = thinwire("train", write_run(folder, corpus, cluster=CLUSTER, run=RUN))
    assert done.returncode == 0, done.stderr
    return losses(folder / "run")


def losses(folder: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in steps(folder / EVENTS_FILE).items()}


@pytest.mark.parametrize("victims", ["all", "one", "launcher"])
def test_a_killed_run_goes_on_with_the_same_bits(
    corpus: Path, tmp_path: Path, uninterrupted: dict[int, float], victims: str
) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run=RUN)
    process = start("train", path)
    wait_for_step(tmp_path / "run", random.Random(victims).randint(6, 25))
    ranks = ranks_of(process)
    assert len(ranks) == 2
    if victims == "launcher":
        process.kill()
    else:
        for pid in ranks if victims == "all" else ranks[1:]:
            os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    end_s = time.monotonic() + 60
    if victims != "launcher":
        assert process.returncode == 1
        assert "was ended by SIGKILL" in output
        assert "Connection closed by peer" not in output
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end_s, "a rank outlived its launcher"
        time.sleep(0.05)
    again = thinwire("train", path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == uninterrupted


def test_a_kill_during_a_checkpoint_write_loses_only_that_checkpoint(
    corpus: Path, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run=RUN, checkpoint={"every_steps": 1})
    process = start("train", path)
    wait_for_step(tmp_path / "run", 8)
    checkpoints, caught = tmp_path / "run" / "checkpoints", False
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s and not caught and process.poll() is None:
        caught = any(any(partial.iterdir()) for partial in checkpoints.glob(".step-*.partial") if partial.exists())
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert caught, "no write was seen under way"
    again = thinwire("train", path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == uninterrupted
    assert not list(checkpoints.glob(".step-*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_first_signal_finishes_the_step_saves_and_exits_0(
    corpus: Path, tmp_path: Path, uninterrupted: dict[int, float], number: signal.Signals
) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run=RUN, checkpoint={"every_steps": 0})
    process = start("train", path)
    wait_for_step(tmp_path / "run", 5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "the same command goes on from there" in output
    last = max(losses(tmp_path / "run"))
    assert last < 30
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    again = thinwire("train", path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == uninterrupted


def test_a_signal_before_the_ranks_can_listen_is_kept(corpus: Path, tmp_path: Path) -> None:
    """As Slurm may send it while they still import; a rank of its own session does not see what only the launcher gets."""
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run={**RUN, "steps": 100000})
    process = start_anew("train", path)
    told: set[int] = set()
    end_s = time.monotonic() + 60
    while len(told) < 2 and time.monotonic() < end_s:
        for pid in set(ranks_of(process)) - told:
            os.kill(pid, signal.SIGUSR1)
            told.add(pid)
    output, _ = process.communicate(timeout=100)
    assert len(told) == 2
    assert process.returncode == 0, output
    assert max(losses(tmp_path / "run")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_before_its_ranks_have_met_ends_at_once_with_status_0(
    corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_anew("train", write_run(tmp_path, corpus, cluster=CLUSTER, run={**RUN, "steps": 100000}))
    end_s = time.monotonic() + 60
    while len(ranks_of(process)) < 2 and time.monotonic() < end_s:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "stopped before the ranks had met; the same command starts again" in output
    assert not (tmp_path / "run" / EVENTS_FILE).exists()


def test_a_second_ctrl_c_leaves_at_once(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run={**RUN, "steps": 100000})
    process = start("train", path)
    wait_for_step(tmp_path / "run", 3)
    ranks = ranks_of(process)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)  # the step cannot finish
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    end_s = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_raises_is_named_first_without_the_others_echo(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run=RUN)
    poison = tmp_path / "sitecustomize.py"
    poison.write_text(
        "import sys\n"
        "if any('\"rank\": 1' in a for a in sys.orig_argv):\n"
        "    import thinwire.train.schedule as s\n"
        "    plain = s.lr_at\n"
        "    def lr_at(step, **k):\n"
        "        if step == 4: raise ZeroDivisionError('a made-up fault of rank 1')\n"
        "        return plain(step, **k)\n"
        "    s.lr_at = lr_at\n"
    )
    process = subprocess.run(
        command("train", path), capture_output=True, text=True, timeout=90, check=False,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.returncode == 1
    first = process.stderr.strip().splitlines()[0]
    assert first == "thinwire: rank 1: ZeroDivisionError: a made-up fault of rank 1"
    assert "Connection closed" not in process.stderr + process.stdout
    assert "rank 0:" not in process.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_training_goes_on_over_a_full_disk_and_says_so(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        path = write_run(disk, corpus, run={**RUN, "steps": 20}, checkpoint={"every_steps": 5, "keep_last": 1})
        done = thinwire("train", path)
        assert done.returncode == 1, "the last save failed"
        assert "could not be saved: rank 0: No space left on device" in done.stdout.replace("\n", " ")
        last = "the last checkpoint, of step 20, could not be saved: rank 0: No space left on device; the newest is"
        assert f"{last} {disk}/run/checkpoints/step-00000005" in done.stderr, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert next(read_events(disk / "run" / EVENTS_FILE, "run_end"))["reason"] == "finished, but not saved"
        assert sorted(losses(disk / "run")) == list(range(1, 21))
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    finally:
        subprocess.run(["umount", disk], check=True)


def _torchrun(folder: Path, ranks: int) -> list[str]:
    """The command line on so many ranks, as torchrun starts a script."""
    script = folder / "main.py"
    script.write_text("from thinwire.cli import main\nmain()\n")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]


def test_torchrun_starts_the_same_run(corpus: Path, tmp_path: Path, uninterrupted: dict[int, float]) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run=RUN)
    done = subprocess.run(
        [*_torchrun(tmp_path, 2), "train", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_torchrun_of_another_size_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster=CLUSTER, run=RUN)
    wrong = subprocess.run(
        [*_torchrun(tmp_path, 3), "train", str(path)], capture_output=True, text=True, timeout=120,
        check=False, env=environment(),
    )  # fmt: skip
    assert wrong.returncode != 0
    assert "the levels node=2 make 2 ranks, but the launcher started 3" in wrong.stderr
