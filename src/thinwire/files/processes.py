"""Which process something belongs to, in words that any other process can check later. No torch.

A number alone does not do: numbers are used again, and mean nothing on another machine, after a boot or in a container.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
