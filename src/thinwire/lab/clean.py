"""What labs of dead owners left behind, found by name prefix, and its removal.

Usually nothing: a lab's processes die with their owner. What can stay is a lab whose agent was stopped or hung in the
kernel at that moment, and the temporary folder of its logs.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from thinwire.lab.host import AGENT, is_name, owner_lives


@dataclass(frozen=True)
class Found:
    """A lab of this user on this machine. `pid`: the process that holds it; None: only `folder` is left."""

    name: str
    alive: bool
    """Whether its owner still runs."""
    pid: int | None
    folder: Path | None


def find() -> list[Found]:
    """All labs of this user, those in use too."""
    holders = dict(_holders())
    folders = {path.name: path for path in Path(tempfile.gettempdir()).iterdir() if is_name(path.name) and _ours(path)}
    names = sorted({*holders, *folders})
    return [Found(name, owner_lives(name), holders.get(name), folders.get(name)) for name in names]


def remove(lab: Found) -> None:
    """End its processes, and with them its namespaces; delete its folder."""
    if lab.pid is not None:
        with suppress(ProcessLookupError):
            holder = os.pidfd_open(lab.pid)
            try:
                if _lab_of(lab.pid) == lab.name:
                    signal.pidfd_send_signal(holder, signal.SIGKILL)
            finally:
                os.close(holder)
    if lab.folder is not None:
        shutil.rmtree(lab.folder, ignore_errors=True)


def _holders() -> Iterator[tuple[str, int]]:
    """Name and process of every lab of this user whose owner's process numbers are ours."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (name := _lab_of(int(entry.name))) and _ours(entry):
            yield name, int(entry.name)


def _lab_of(pid: int) -> str | None:
    """The lab that process `pid` holds: it is the `unshare` in this process namespace whose child is the agent."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        here = Path(f"/proc/{pid}/ns/pid").stat().st_ino == Path("/proc/self/ns/pid").stat().st_ino
        if here and Path(words[0]).name == "unshare" and AGENT in words:
            name = words[words.index(AGENT) + 1]
            return name if is_name(name) else None
    return None


def _ours(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_uid == os.geteuid()
    return False
