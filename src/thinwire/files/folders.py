"""A folder or file that is written atomically: hidden beside its place, renamed into it at the end. No torch.

A folder that is being written, or used for a while, is named after its process: what is left of one that was killed is
removed by the next, and what belongs to one that runs is left alone. A process is named so that any other can tell later
whether it runs: a number alone does not do, as numbers are used again, and mean nothing on another machine, after a boot or
in a container.
"""

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from thinwire.errors import ConfigError, ThinwireError

_SCRATCH = "thinwire-"


def _never(folder: Path) -> bool:
    return False


@contextmanager
def atomic_folder(
    target: Path, *, force: bool, error: type[ThinwireError] = ConfigError, goes_on: Callable[[Path], bool] = _never
) -> Iterator[Path]:
    """A new hidden folder to write into; when the context ends well it becomes `target`, else nothing is left.

    Leftovers of processes that are gone are removed first. One that `goes_on` accepts is taken up instead, and such a
    folder stays, hidden, when the context ends badly. Raises `error` if `target` exists (unless `force`), or cannot be
    written.
    """
    if target.exists() and not force:
        raise error(f"{target} exists already; choose another folder or use --force to replace it")
    partial = target.with_name(f".{target.name}.partial-{Process.this().tag}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _take_up(target, partial, goes_on)
        yield partial
        _replace(partial, target)
    except OSError as reason:
        raise error(f"{target} cannot be written: {reason.strerror or reason}; choose another with -o") from None
    finally:
        if not goes_on(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _take_up(target: Path, partial: Path, goes_on: Callable[[Path], bool]) -> None:
    """Make `partial`, or rename a leftover that goes on into it; remove all others."""
    left = sorted(target.parent.glob(f".{target.name}.partial-*"))
    left = [path for path in left if path == partial or owner_has_ended(path.name)]
    kept = next((path for path in left if goes_on(path)), None)
    for path in left:
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    if kept is None:
        partial.mkdir()
    elif kept != partial:
        kept.rename(partial)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files (in TMPDIR) while the context lasts. Raises ConfigError if none can be made."""
    try:
        for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
            with suppress(OSError):  # gone since, by another start
                if owner_has_ended(path.name) and path.stat().st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
        made = tempfile.TemporaryDirectory(prefix=_SCRATCH, suffix=f"-{Process.this().tag}", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"no temporary folder can be made: {error.strerror}; set TMPDIR to one with room") from None
    with made as folder:
        yield Path(folder)


def write_atomic(path: Path, text: str, *, writer: str = "") -> None:
    """Write beside `path`, sync, then rename: a reader sees the old text or the new, never half. Raises OSError.

    `writer` tells apart those who may write it in the same moment.

    What is no plain file (a device, a pipe, a link) is written to, not replaced: nothing may take the place of /dev/null.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f".{path.name}.{writer}partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_asked(path: Path, text: str, *, option: str) -> None:
    """`write_atomic` where the user said, with `option`. Raises ConfigError."""
    with _asked(path, option):
        write_atomic(path, text)


def check_writable(path: Path, *, option: str) -> None:
    """Raises ConfigError if `write_asked` could not write there: before what takes minutes is done for it."""
    with _asked(path, option):
        if path.is_symlink() or path.exists():
            path.open("ab").close()
        else:
            partial = path.with_name(f".{path.name}.partial")
            partial.open("wb").close()
            partial.unlink()


@contextmanager
def _asked(path: Path, option: str) -> Iterator[None]:
    """What the system refuses of a path that a user gave, as ConfigError."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path without a name
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"{path} cannot be written: {reason}; choose another with {option} PATH") from None


State = Literal["runs", "ended", "unknown"]


@dataclass(frozen=True)
class Process:
    """A process of some machine."""

    host: str
    boot: str
    """Of the machine: another one after every boot."""
    space: str
    """In which numbers of processes are counted: a container has one of its own."""
    pid: int
    start: int
    """Ticks since boot: tells it from a later process of its number."""

    @staticmethod
    def this() -> "Process":
        """The calling process."""
        boot = _text(Path("/proc/sys/kernel/random/boot_id"))
        return Process(socket.gethostname(), boot, _space(), os.getpid(), start_ticks(os.getpid()) or 0)

    def state(self) -> State:
        """Whether it still runs; unknown on another machine."""
        here = Process.this()
        if self.host != here.host:
            return "unknown"
        if self.boot != here.boot:
            return "ended"
        if self.space != here.space:
            return "unknown"
        return "runs" if start_ticks(self.pid) == self.start else "ended"

    @property
    def tag(self) -> str:
        """For a file's name."""
        return "-".join([str(self.pid), str(self.start), *(_short(one) for one in (self.host, self.boot, self.space))])


def owner_has_ended(name: str) -> bool:
    """Whether the process whose `tag` ends the file name `name` has certainly ended."""
    here = Process.this()
    parts = name.split("-")[-5:]
    if len(parts) < 5 or not (parts[-5].isdigit() and parts[-4].isdigit()):
        return False
    same = [part == _short(own) for part, own in zip(parts[-3:], (here.host, here.boot, here.space), strict=True)]
    if same == [True, True, True]:
        return start_ticks(int(parts[-5])) != int(parts[-4])
    return same[:2] == [True, False]


def start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot: tells it from a later one of its number. None if it has ended.

    Where the system does not tell, 0 for every process that runs.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if Path("/proc/self/stat").exists() else _plainly(pid)
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _plainly(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0


def _space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
