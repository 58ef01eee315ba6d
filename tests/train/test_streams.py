"""Output that goes away ends nothing: a reader that left, a full disk, streams that were closed before the start."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import command, environment, make_corpus, write_run
from thinwire.files.events import read_events
from thinwire.train.console import Forgiving

PRESETS = [sys.executable, "-m", "thinwire", "presets"]


def test_what_is_refused_is_forgotten_and_the_reason_kept() -> None:
    reader, writer = os.pipe()
    stream = Forgiving(writer)
    assert stream.write(b"one") == 3
    assert os.read(reader, 9) == b"one"
    os.close(reader)
    assert stream.write(b"two") == 3
    assert stream.refused is not None and stream.refused.errno == errno.EPIPE
    assert stream.write(b"three") == 5
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_takes_nothing_and_raises_nothing() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        text = io.TextIOWrapper(io.BufferedWriter(Forgiving(full.fileno())), line_buffering=True)
        print("a line", file=text)
        text.flush()
        raw = text.buffer.raw
        assert isinstance(raw, Forgiving) and raw.refused is not None and raw.refused.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("shell", "status", "says"),
    [
        ("| head -n 1", 0, ""),
        ("2>&1 | head -n 1", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("> /dev/full", 1, "thinwire: standard output takes no more (No space left on device)"),
        ("> /dev/full 2>&1", 1, ""),
    ],
)
def test_a_verb_ends_quietly(shell: str, status: int, says: str) -> None:
    line = f'set -o pipefail; "$@" {shell}'
    done = subprocess.run(
        ["bash", "-c", line, "-", *PRESETS], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == (1 if says else 0)


@pytest.mark.slow
def test_a_run_goes_on_without_its_reader_and_closed_streams_become_no_files(tmp_path: Path) -> None:
    sections = {"cluster": {"levels": [2]}, "run": {"steps": 6, "log_every": 1}, "checkpoint": {"every_steps": 2}}
    run_file = write_run(tmp_path, make_corpus(tmp_path), **sections)
    left = subprocess.run(
        ["bash", "-c", '"$@" 2>&1 | head -n 1; exit ${PIPESTATUS[0]}', "-", *command("train", run_file)],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert left.returncode == 0
    assert [record["step"] for record in read_events(tmp_path / "run" / "events.jsonl", "step")] == [1, 2, 3, 4, 5, 6]
    closed = subprocess.run(
        ["bash", "-c", '"$@" >&- 2>&- <&-', "-", *command("train", run_file, "--set", "run.steps=8")],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert closed.returncode == 0
    assert [record["step"] for record in read_events(tmp_path / "run" / "events.jsonl", "step")][-1] == 8
