"""One writer: a lock that names its holder and is gone with it, on file systems with locks and without."""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jump import Jump
from thinwire.errors import ConfigError
from thinwire.files.folders import Process, owner_has_ended
from thinwire.files.locks import LOCK, hold

_HOLDER = """
import errno, fcntl, os, sys, time
from pathlib import Path
from thinwire.files import locks
folder, number, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if number:
    def flock(*args): raise OSError(number, os.strerror(number))
    fcntl.flock = flock
locks._BEAT_S, locks._SETTLE_S, locks._LEAVING_S = 0.05, 0.3, 0.5
try:
    lock = locks.hold(folder)
except Exception as error:
    print(error, flush=True); sys.exit(2)
if what == "child":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.descriptor])
    print("held", child.pid, flush=True)
else:
    print("held", flush=True)
time.sleep(60)
"""
NO_LOCKS = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS]


@contextmanager
def holder(folder: Path, number: int = 0, what: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that asks for the lock; where `number` is given, its file system has none."""
    command = [sys.executable, "-c", _HOLDER, str(folder), str(number), what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def without_locks(patch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [0, *NO_LOCKS], ids=lambda number: errno.errorcode.get(number, "locks"))
def test_a_second_writer_is_told_who_the_first_is_and_gets_the_lock_when_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    if number:
        without_locks(monkeypatch, number)
    with holder(tmp_path, number) as first:
        assert first_line(first) == "held"
        with pytest.raises(ConfigError, match=f"process {first.pid} on host {socket.gethostname()} is training in"):
            hold(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
        hold(tmp_path, clock=Jump()).release()
    assert list(tmp_path.iterdir()) == []


def test_a_note_says_host_process_and_boot(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    there = json.loads((tmp_path / LOCK).read_text())["holder"]
    assert there["host"] == socket.gethostname() and there["pid"] == os.getpid()
    assert there["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    lock.release()


def test_the_lock_is_held_until_the_last_rank_is_gone(tmp_path: Path) -> None:
    with holder(tmp_path, what="child") as launcher:
        rank = int(first_line(launcher).split()[1])
        launcher.kill()
        launcher.wait()
        with pytest.raises(ConfigError, match=f"process {launcher.pid} .* has ended, but ranks of it still run"):
            hold(tmp_path, clock=Jump())
        clock = Jump(after_5=lambda: _end(rank))
        hold(tmp_path, clock=clock).release()  # waited for the rank
        assert 5 <= clock.slept_s < 6


def _end(pid: int) -> None:
    """Kill a process that is not our child, and wait until it is gone."""
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([descriptor], [], [])
    os.close(descriptor)


def test_a_file_that_its_holder_removes_in_that_moment_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the file, the first removes it, the second locks what has no name any more: it tries again."""
    first, plain, opened = hold(tmp_path), os.open, []

    def opens(*args: int) -> int:
        descriptor = plain(*args)
        if not opened:
            opened.append(descriptor)
            first.release()
        return descriptor

    monkeypatch.setattr(os, "open", opens)
    second = hold(tmp_path)
    assert (tmp_path / LOCK).stat().st_ino == os.fstat(second.descriptor or -1).st_ino
    second.release()


def _of_another_host(folder: Path, *, lease: bool = True) -> None:
    note = {"holder": {**vars(Process.this()), "host": "far", "pid": 7}, "lease": lease, "nonce": "theirs"}
    (folder / LOCK).write_text(json.dumps(note))


def test_a_lease_of_another_host_is_over_when_nobody_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    _of_another_host(tmp_path)
    clock = Jump()
    lock = hold(tmp_path, clock=clock)
    assert 60 <= clock.slept_s < 65
    assert json.loads((tmp_path / LOCK).read_text())["holder"]["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("sees_locks", [False, True])
def test_a_lease_of_another_host_that_is_touched_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees_locks: bool
) -> None:
    if not sees_locks:
        without_locks(monkeypatch)
    _of_another_host(tmp_path)
    with pytest.raises(ConfigError, match=r"process 7 on host far is training in .*; if it has ended without a trace"):
        hold(tmp_path, clock=Jump(after_50=lambda: os.utime(tmp_path / LOCK)))


def test_a_lock_that_only_another_host_sees_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    _of_another_host(tmp_path, lease=False)
    with pytest.raises(ConfigError, match="process 7 on host far is training in"):
        hold(tmp_path)


def test_a_lease_from_before_a_boot_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    note = {"holder": {**vars(Process.this()), "boot": "an earlier one"}, "lease": True, "nonce": "theirs"}
    (tmp_path / LOCK).write_text(json.dumps(note))
    hold(tmp_path, clock=Jump()).release()


def test_who_loses_its_lease_leaves(tmp_path: Path) -> None:
    """A holder that stood still long enough for another host to take over must not write any more."""
    with holder(tmp_path, errno.ENOLCK) as first:
        assert first_line(first) == "held"
        _of_another_host(tmp_path)
        assert first.wait(timeout=30) == 1
        assert first.stderr is not None
        assert "process 7 on host far has taken over" in first.stderr.read()


def test_of_two_that_take_a_lease_in_the_same_moment_one_gets_it(tmp_path: Path) -> None:
    with holder(tmp_path, errno.ENOLCK) as one, holder(tmp_path, errno.ENOLCK) as other:
        said = sorted([first_line(one), first_line(other)])
    assert said[0] == "held" and "is training in" in said[1], said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"holder": 3}', '{"holder": {"pid": 1}, "lease": false}'])
def test_a_half_written_note_holds_nothing(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text(text)
    hold(tmp_path).release()
    (tmp_path / LOCK).write_text(text)
    without_locks(monkeypatch)
    hold(tmp_path, clock=Jump()).release()


def _fails(number: int) -> Callable[..., int]:
    def fails(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return fails


def test_on_a_full_disk_the_lock_has_no_name_but_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", _fails(errno.ENOSPC))
    lock = hold(tmp_path)
    with holder(tmp_path) as second:
        assert first_line(second).startswith("another process is training in")
    lock.release()


def test_a_tag_tells_a_process_that_has_ended_from_one_that_runs() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", f"{_TAG}; time.sleep(60)"], stdout=subprocess.PIPE, text=True
    ) as other:
        tag = first_line(other)
        assert not owner_has_ended(f"thinwire-x-{tag}")
        other.kill()
    assert owner_has_ended(f"thinwire-x-{tag}")
    pid, start, host, boot, space = tag.split("-")
    assert not owner_has_ended(f"x-{pid}-{start}-0000-{boot}-{space}"), "another host's"
    assert owner_has_ended(f"x-{pid}-{start}-{host}-0000-{space}"), "from before a boot"
    assert not owner_has_ended(f"x-{pid}-{start}-{host}-{boot}-0000"), "another container's"
    for name in ("thinwire-x", "thinwire-lab-1-2-abc", "a-b-c-d-e", ""):
        assert not owner_has_ended(name)


_TAG = "import time; from thinwire.files.folders import Process; print(Process.this().tag, flush=True)"
