"""Labs for tests: whether this machine permits them, the peer program, being an ordinary user, what is left over."""

import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from thinwire.errors import LabError
from thinwire.lab.host import AGENT, Inside, check_machine, new_name

PEER = str(Path(__file__).with_name("lab_peer.py"))
SOURCE = Path(__file__).parents[1] / "src"
_NOBODY = 65534


@functools.cache
def _refusal(rootless: bool | None) -> str | None:
    try:
        check_machine(os.environ)
        Inside.open(new_name(), rootless=rootless).close()
    except LabError as error:
        return str(error)
    return None


def need_lab(*, rootless: bool | None = None) -> None:
    """Skip the test, with the lab's own sentence, on a machine that permits none."""
    if (reason := _refusal(rootless)) is not None:
        pytest.skip(reason)


def peer(*words: str) -> list[str]:
    """The command line of `lab_peer.py`."""
    return [sys.executable, PEER, *words]


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether `holds()` becomes true in time."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if holds():
            return True
        time.sleep(0.02)
    return holds()


def as_ordinary_user(command: list[str], folder: Path) -> list[str]:
    """`command` run by a user without any right; `folder` is for scratch.

    Already one: as it is. As root: as nobody, with a private view of the file system in which folders that only root
    may pass (such as /root) let through to the interpreter and the source. Skips where that cannot be had.
    """
    if os.geteuid() != 0:
        return command
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        pytest.skip("this machine has no setpriv or no unshare to become an ordinary user with")
    steps = ["set -e"]
    needed = [Path(sys.executable), Path(sys.executable).resolve(), Path(sys.prefix), SOURCE.resolve(), Path(PEER)]
    for number, (blocked, children) in enumerate(sorted(_blocked(needed).items())):
        saved = folder / f"saved-{number}"
        saved.mkdir()
        steps += [f"mount --bind {blocked} {saved}", f"mount -t tmpfs -o mode=755 tmpfs {blocked}"]
        for child in sorted(children):
            steps += [f"mkdir -p {blocked}/{child}", f"mount --bind {saved}/{child} {blocked}/{child}"]
    user = f"setpriv --reuid={_NOBODY} --regid={_NOBODY} --clear-groups"
    steps.append(f'exec {user} env HOME={folder} TMPDIR={folder} PATH="$PATH" "$@"')
    return ["unshare", "--mount", "bash", "-c", "\n".join(steps), "bash", *command]


def _blocked(paths: list[Path]) -> dict[Path, set[str]]:
    """Folders that others may not pass on the way to `paths`, and the entries of each that are needed."""
    found: dict[Path, set[str]] = {}
    for path in paths:
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                found.setdefault(parent, set()).add(path.relative_to(parent).parts[0])
                break
    return found


def marked(mark: str) -> list[int]:
    """Processes of this machine whose environment holds LAB_MARK=`mark`, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"LAB_MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def command_line(pid: int) -> list[str]:
    """A process's arguments; none if it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return [""]


def agents(mark: str) -> list[int]:
    """The agents (process 1 inside) of marked labs."""
    return [pid for pid in marked(mark) if AGENT in (words := command_line(pid)) and "unshare" not in words[0]]


def holders(mark: str) -> list[int]:
    """The processes that hold marked labs."""
    return [pid for pid in marked(mark) if AGENT in (words := command_line(pid)) and "unshare" in words[0]]


def peers(mark: str) -> list[int]:
    """Marked processes on the hosts."""
    return [pid for pid in marked(mark) if PEER in command_line(pid)[:2]]


def network_namespaces(pids: Iterable[int] | None = None) -> set[int]:
    """The network namespaces, other than this process's own, of some processes (None: of all on this machine)."""
    all_pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = set()
    for pid in all_pids if pids is None else pids:
        try:
            found.add(Path(f"/proc/{pid}/ns/net").stat().st_ino)
        except OSError:
            continue
    return found - {Path("/proc/self/ns/net").stat().st_ino}
