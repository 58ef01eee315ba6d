"""A disk that is full, in the middle of a run or at its end, costs what docs/checkpoints.md says and no more."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runs import make_corpus, start, thinwire, write_run
from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


def test_a_full_disk_stops_nothing_loses_no_event_and_an_end_without_a_save_is_told(tmp_path: Path, disk: Path) -> None:
    run = {"steps": 100_000, "eval_every": 0, "sample_tokens": 0, "eval_sequences": 4, "log_every": 1}
    path = write_run(
        disk, make_corpus(tmp_path / "data"), cluster={"levels": [2]}, run=run, checkpoint={"every_steps": 10}
    )
    events, process = disk / "run" / EVENTS_FILE, start("train", path)
    try:
        wait_until(lambda: events.exists() and len(steps(events)) > 12, "nothing happened")
        fill(disk / "filler")
        wait_until(lambda: "could not be saved" in process.said(), "no save failed on a full disk")
        shown = process.said().count("step ")
        wait_until(lambda: process.said().count("step ") > shown + 15, "training does not go on")
        last = max(steps(events))
        (disk / "filler").unlink()
        wait_until(lambda: max(steps(events)) > last + 15, "events do not go on once there is room")
        assert sorted(steps(events)) == list(range(1, max(steps(events)) + 1)), "a step is missing"
        fill(disk / "filler")
        shown = process.said().count("could not be saved")
        wait_until(lambda: process.said().count("could not be saved") > shown, "no save failed on a full disk")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        process.wait()
    text = process.said()
    assert "Traceback" not in text and "Exception" not in text, text[-3000:]
    assert f"{EVENTS_FILE} cannot be written: No space left on device; training goes on" in text
    assert ": the last checkpoint, of step" in text and "No space left on device; the newest is" in text
    assert "tensorboard takes no more records" in text
    assert f"records of {EVENTS_FILE} could not be written" in text
    assert list(read_events(events)) and events.read_bytes().endswith(b"}\n")
    (disk / "filler").unlink()
    end = max(steps(events)) + 30
    again = thinwire("train", path, "--set", f"run.steps={end}")
    assert again.returncode == 0, again.stderr
    assert sorted(steps(events)) == list(range(1, end + 1))
