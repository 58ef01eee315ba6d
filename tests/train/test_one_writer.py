"""Two starts on one run folder: the second is told who is there, and harms nothing; a start after a kill needs nobody."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from runs import command, ended, environment, make_corpus, thinwire, warm, write_run
from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE
from warm import Started

ENDLESS = {"steps": 100_000, "eval_every": 0, "sample_tokens": 0, "eval_sequences": 4}
EXTERNAL = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
"""What torchrun sets for the one rank of a world."""
_NO_LOCKS = """
import errno, fcntl
def flock(*args): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


@contextmanager
def running(*arguments: str | Path, more: Mapping[str, str]) -> Iterator[Started | subprocess.Popen[bytes]]:
    """A start that is killed in the end; what it says goes to a file."""
    env = {**environment(), **more}
    process: Started | subprocess.Popen[bytes]
    if "PYTHONPATH" in more:  # of what only an interpreter that is started anew reads
        none = subprocess.DEVNULL
        process = subprocess.Popen(command("train", *arguments), stdout=none, stderr=none, env=env)
    else:
        process = warm("train", *arguments, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def again(*arguments: str | Path, more: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    env, words = {**environment(), **more}, ["train", *arguments]
    if "PYTHONPATH" in more:
        return subprocess.run(command(*words), capture_output=True, text=True, timeout=120, check=False, env=env)
    return ended(warm(*words, env=env))


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


def stepping(folder: Path) -> Callable[[], bool]:
    """Whether another step is done from now on."""
    path = folder / EVENTS_FILE
    before = path.stat().st_size if path.exists() else 0
    return lambda: path.exists() and path.stat().st_size > before and any(read_events(path, "step"))


def no_locks(folder: Path) -> dict[str, str]:
    """The environment of processes whose file system knows no locks."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_NO_LOCKS)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


STARTS = {
    "launcher": ([2], (), {}),
    "launcher without locks": ([2], (), {}),
    "a rank of torchrun": ([1], (), EXTERNAL),
    "one launcher a node": ([2], ("--ranks-per-node=2",), EXTERNAL),
}


@pytest.mark.parametrize(
    "start", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("without locks")) for name in STARTS]
)
def test_a_second_start_is_refused_and_after_a_kill_it_is_not(corpus: Path, tmp_path: Path, start: str) -> None:
    levels, options, more = STARTS[start]
    if start.endswith("without locks"):
        more = {**more, **no_locks(tmp_path / "site")}
    path = write_run(tmp_path, corpus, cluster={"levels": levels}, run=ENDLESS, checkpoint={"every_steps": 3})
    folder = tmp_path / "run"
    with running(path, *options, more=more) as first:
        wait_until(stepping(folder), "the first start did nothing")
        partial = folder / "checkpoints" / ".step-99999999.0000.partial"
        partial.mkdir(parents=True)
        for fresh in ((), ("--fresh",)):
            second = again(path, *options, *fresh, more=more)
            assert second.returncode == 2, second.stderr
            (line,) = [line for line in second.stderr.splitlines() if line.startswith("thinwire:")]
            assert f"process {first.pid} on host {socket.gethostname()} is training in {folder}" in line
            assert "Traceback" not in second.stderr
        wait_until(lambda: any((folder / "checkpoints").glob("step-*")), "the first start has saved nothing")
        for verb in (
            ("eval", folder),
            ("export", folder, "-o", tmp_path / "out"),
            ("report", folder, "-o", tmp_path / "x"),
        ):
            done = thinwire(*verb)
            assert done.returncode == 0, done.stderr
        assert partial.is_dir() and not (tmp_path / "run.1").exists()
        wait_until(stepping(folder), "the first start stands still since the second")
    third = again(path, *options, "--set", f"run.steps={max(steps(folder / EVENTS_FILE)) + 3}", more=more)
    assert third.returncode == 0, third.stderr
    assert not list((folder / "checkpoints").glob(".*")) and not (folder / ".lock").exists()


def test_a_rank_that_outlives_its_launcher_still_holds_the_folder(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster={"levels": [2]}, run=ENDLESS)
    with running(path, more={}) as first:
        wait_until(stepping(tmp_path / "run"), "nothing happened")
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGSTOP)
        first.kill()
        first.wait()
        try:
            second = again(path, more={})
            assert second.returncode == 2
            assert re.search(rf"process {first.pid} on host .* has ended, but ranks of it still run", second.stderr)
        finally:
            os.kill(int(children[0]), signal.SIGKILL)


def test_what_a_killed_launcher_left_in_tmpdir_is_removed_by_the_next_start(corpus: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    more = {"TMPDIR": str(temporary)}
    foreign = temporary / "thinwire-of-somebody"
    foreign.mkdir()
    one, other = (write_run(tmp_path, corpus, name, cluster={"levels": [1]}, run=ENDLESS) for name in ("one", "other"))
    with running(one, more=more) as killed:
        wait_until(stepping(tmp_path / "one"), "nothing happened")
        killed.kill()
        killed.wait()
    (left,) = set(temporary.iterdir()) - {foreign}
    with running(other, more=more):
        wait_until(stepping(tmp_path / "other"), "nothing happened")
        (lives,) = set(temporary.iterdir()) - {foreign}
        assert lives != left
        done = again(one, "--set", f"run.steps={max(steps(tmp_path / 'one' / EVENTS_FILE)) + 2}", more=more)
        assert done.returncode == 0, done.stderr
        assert lives.is_dir() and foreign.is_dir()


def test_fresh_puts_a_run_aside_that_nobody_holds(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster={"levels": [1]}, run={**ENDLESS, "steps": 3})
    for number in range(2):
        done = again(path, "--fresh", more={})
        assert done.returncode == 0, done.stderr
        assert sorted(steps(tmp_path / "run" / EVENTS_FILE)) == [1, 2, 3]
        assert len(list(tmp_path.glob("run.[0-9]"))) == number
    assert not list(tmp_path.glob("run*/.lock"))


def test_a_run_that_has_saved_never_begins_anew_unasked(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster={"levels": [1]}, run={**ENDLESS, "steps": 6})
    assert again(path, more={}).returncode == 0
    before = (tmp_path / "run" / EVENTS_FILE).read_bytes()
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    torn = again(path, "--set", "run.steps=8", more={})
    assert "none of the 2 checkpoints" in torn.stderr and "step-00000006" in torn.stderr
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    removed = again(path, "--set", "run.steps=8", more={})
    assert "no checkpoint any more, though that of step 6 was saved" in removed.stderr
    for done in (torn, removed):
        assert done.returncode == 2 and "--fresh" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / EVENTS_FILE).read_bytes() == before


def test_a_folder_that_is_no_run_is_refused_and_nothing_is_written_there(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster={"levels": [1]}, run={**ENDLESS, "steps": 3})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    done = again(path, more={})
    assert done.returncode == 2 and "is not empty and holds no run.toml" in done.stderr
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["mine.txt"]
