"""One writer for a folder: a lock that dies with the processes that hold it, and says who they are. No torch.

The lock is `flock` on a file in the folder. It belongs to the open file, so a launcher hands it to the ranks that it
starts: it is gone when the last of them is, and not before. Where the file system has no locks, the file is a lease: its
holder touches it every few seconds, and it is over when the holder has ended, or, if that runs on another machine, when
the file has not been touched for a minute.
"""

import errno
import fcntl
import json
import os
import secrets
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from thinwire.errors import HeldError
from thinwire.files.folders import Process, write_atomic
from thinwire.units import SYSTEM_CLOCK, SystemClock

LOCK = ".lock"
_BEAT_S, _LEASE_S = 10.0, 60.0
_LEAVING_S, _SETTLE_S, _POLL_S = 10.0, 1.0, 0.1
"""For ranks to leave after their launcher; for two that take a lease over in the same moment."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class _Note:
    """What the file says."""

    holder: Process
    lease: bool
    nonce: str


class Lock:
    """Held until `release`, until nobody refers to it, or until this process and those with `descriptor` have ended."""

    def __init__(self, path: Path, note: _Note, descriptor: int | None) -> None:
        self._path, self._note = path, note
        self.descriptor = descriptor
        """For `pass_fds` of processes that hold it too; None if it is a lease."""
        self._over = threading.Event()
        if note.lease:
            threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def moved_to(self, folder: Path) -> None:
        """The folder was renamed."""
        self._path = folder / LOCK

    def release(self) -> None:
        self._over.set()
        with suppress(OSError):
            if _read(self._path) == self._note:
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = _close

    def _keep(self) -> None:
        """Touch the lease; leave at once if somebody took it over, which is only done to holders that stood still."""
        while not self._over.wait(_BEAT_S):
            with suppress(OSError):
                note = _read(self._path)
                if note is not None and note != self._note and not self._over.is_set():
                    print(f"thinwire: {_who(note)} has taken over {self._path.parent}; this run ends", file=sys.stderr)
                    os._exit(1)
                os.utime(self._path)


def hold(folder: Path, *, clock: SystemClock = SYSTEM_CLOCK) -> Lock:
    """Take the lock of `folder`, which exists. Raises HeldError naming the holder if there is one, and OSError."""
    path, since_s = folder / LOCK, clock.now()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        lock = None
        try:
            locked = _try_lock(descriptor)
            if locked == "busy":
                _await_leaving(path, since_s, clock)
            elif _same_file(descriptor, path):
                lock = _lock(path, descriptor, clock) if locked == "yes" else _lease(path, clock)
                return lock
        finally:
            if lock is None or lock.descriptor is None:
                os.close(descriptor)


def _try_lock(descriptor: int) -> Literal["yes", "busy", "none"]:
    """`none`: the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return "none"
    return "yes"


def _await_leaving(path: Path, since_s: float, clock: SystemClock) -> None:
    """Ranks whose launcher was killed leave in a moment; raises HeldError for anybody else who holds the lock."""
    note = _read(path)
    leaving = note is None or note.holder.state() == "ended"
    if not leaving or clock.now() > since_s + _LEAVING_S:
        raise _held(path, note)
    clock.sleep(_POLL_S)


def _lock(path: Path, descriptor: int, clock: SystemClock) -> Lock:
    """The locked file is ours, unless it is the lease of somebody who sees no locks."""
    old = _read(path)
    if old is not None and old.lease and _lives(path, old, clock):
        raise _held(path, old)
    note = _new_note(lease=False)
    with suppress(OSError):  # on a full disk the lock has no name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _text(note).encode(), 0)
    return Lock(path, note, descriptor)


def _lease(path: Path, clock: SystemClock) -> Lock:
    old = _read(path)
    if old is not None and _lives(path, old, clock):
        raise _held(path, old)
    note = _new_note(lease=True)
    write_atomic(path, _text(note), writer=note.nonce)  # another may take it over in this moment
    clock.sleep(_SETTLE_S)
    there = _read(path)
    if there is not None and there != note:
        raise _held(path, there)
    return Lock(path, note, None)


def _new_note(*, lease: bool) -> _Note:
    return _Note(Process.this(), lease, secrets.token_hex(8))


def _lives(path: Path, note: _Note, clock: SystemClock) -> bool:
    """Whether the holder of a lease still runs; of one on another machine: whether it touches the file."""
    state = note.holder.state()
    if state != "unknown":
        return state == "runs"
    if not note.lease:
        return True
    touched, end_s = path.stat().st_mtime_ns, clock.now() + _LEASE_S
    while clock.now() < end_s:
        clock.sleep(_POLL_S)
        with path.open("rb") as file:  # opening asks a file server anew
            if os.fstat(file.fileno()).st_mtime_ns != touched:
                return True
    return False


def _held(path: Path, note: _Note | None) -> HeldError:
    folder = path.parent
    if note is None:
        return HeldError(
            f"another process is training in {folder}; wait for its end, or choose another run.folder",
            "another process",
        )
    state, way_out = note.holder.state(), "or choose another folder with --set run.folder=PATH"
    if state == "ended":
        return HeldError(
            f"{_who(note)}, which was training in {folder}, has ended, but ranks of it still run; end them (`fuser {path}` "
            f"lists them), {way_out}",
            _who(note),
        )
    here = "" if state == "runs" else f"; if it has ended without a trace, remove {path}"
    return HeldError(f"{_who(note)} is training in {folder}; wait for its end or stop it, {way_out}{here}", _who(note))


def _who(note: _Note) -> str:
    return f"process {note.holder.pid} on host {note.holder.host}"


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one of that name: its holder may have removed it, or moved the folder."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _text(note: _Note) -> str:
    return json.dumps(asdict(note)) + "\n"


def _read(path: Path) -> _Note | None:
    """None if there is no file, or one that a killed process has not finished."""
    try:
        tree = json.loads(path.read_bytes())
        return _Note(Process(**tree.pop("holder")), **tree)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
