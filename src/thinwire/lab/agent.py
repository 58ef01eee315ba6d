"""The process inside a lab: `python -m thinwire.lab.agent NAME CHANNEL OWNER`, started by `thinwire.lab.host`.

It is process 1 of the lab's process namespace, so everything in the lab dies with it, and it leaves when its owner does
(`OWNER` is a descriptor of that process) or when the channel closes. It decides nothing: one JSON object a line asks
for one thing, one answers, `{"ok": ...}` or `{"error": sentence}`.

It makes and enters network and name (UTS) namespaces by thin calls of the C library; Linux only.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from thinwire.lab.outcome import read_interfaces

_NEW_NET, _NEW_UTS = 0x40000000, 0x04000000


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@dataclass(frozen=True)
class Namespaces:
    """A network and a UTS namespace, held by file descriptors: they live as long as these or a process in them."""

    net: int
    uts: int

    @staticmethod
    def current() -> "Namespaces":
        """Those this process is in."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        return Namespaces(os.open("/proc/self/ns/net", flags), os.open("/proc/self/ns/uts", flags))

    @staticmethod
    def new(name: str) -> "Namespaces":
        """New ones with host name `name`; this process stays where it is."""
        home = Namespaces.current()
        try:
            _call("unshare", _NEW_NET | _NEW_UTS)
            socket.sethostname(name)
            return Namespaces.current()
        finally:
            home.enter()
            home.close()

    def enter(self) -> None:
        """Put the calling process into them, for good."""
        _call("setns", self.net, _NEW_NET)
        _call("setns", self.uts, _NEW_UTS)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in them for a while."""
        home = Namespaces.current()
        self.enter()
        try:
            yield
        finally:
            home.enter()
            home.close()

    def pids(self) -> list[int]:
        """Processes whose network namespace this is."""
        inode = os.fstat(self.net).st_ino
        names = [entry.name for entry in Path("/proc").iterdir()]
        return [pid for pid in map(int, filter(str.isdigit, names)) if _inode_of(pid) == inode]

    def close(self) -> None:
        os.close(self.net)
        os.close(self.uts)


def _inode_of(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None


_HOSTS_FILE = Path("/etc/hosts")
_QUIET_ROUNDS = 20


class Agent:
    """What can be asked for; public methods are the requests."""

    def __init__(self) -> None:
        self._hosts: list[Namespaces] = []
        self._members: list[tuple[int, subprocess.Popen[bytes]]] = []

    def make_hosts(self, names: list[str], hosts_file: str) -> dict[str, str]:
        """Make a namespace per name; answers what `ip` may call each."""
        self._hosts = [Namespaces.new(name) for name in names]
        _add_names(hosts_file)
        return {str(host): f"/proc/{os.getpid()}/fd/{spaces.net}" for host, spaces in enumerate(self._hosts)}

    def run(self, commands: list[tuple[int | None, list[str]]]) -> None:
        """Run programs one after the other. Raises RuntimeError with what the first that failed said."""
        for host, argv in commands:
            with self._on(host):
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"`{' '.join(argv)}` said: {' '.join((done.stderr or done.stdout).split())}")

    def spawn(self, host: int, argv: list[str], environment: dict[str, str], cwd: str, log: str) -> int:
        """Start a member on a host, its output in `log`; answers its number."""
        with Path(log).open("wb") as output, self._on(host):
            process = subprocess.Popen(
                argv,
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._members.append((host, process))
        return len(self._members) - 1

    def status(self) -> list[int | None]:
        """Exit status of every member, None while it runs, minus the signal's number if one ended it."""
        codes = [process.poll() for _, process in self._members]
        self._reap_orphans()
        return codes

    def signal(self, number: int, host: int | None = None, rank: int | None = None) -> int:
        """Send a signal to every process of a rank, of a host, or of all hosts; answers how many got it.

        The processes of a rank are those whose environment says RANK. Looks again until nobody new is found, so that
        a process that forks meanwhile does not escape.
        """
        reached: set[int] = set()
        for _ in range(_QUIET_ROUNDS):
            found = set(self._pids(host, rank)) - reached
            if not found:
                break
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            reached |= found
        return len(reached)

    def clear(self) -> None:
        """End every process on the hosts and forget the members."""
        end_s = time.monotonic() + 10
        while self.signal(signal.SIGKILL) and time.monotonic() < end_s:
            self.status()
            time.sleep(0.01)
        self.status()
        self._members = []

    def traffic(self) -> dict[str, Any]:
        """Counters of every interface by name, per host and in the lab's own namespace."""
        hosts = []
        for spaces in self._hosts:
            with spaces.inside():
                hosts.append(_interfaces())
        return {"hosts": hosts, "switches": _interfaces()}

    def _on(self, host: int | None) -> AbstractContextManager[None]:
        """Be on a host, or stay (None); what is started meanwhile begins there."""
        return contextlib.nullcontext() if host is None else self._hosts[host].inside()

    def _pids(self, host: int | None, rank: int | None) -> list[int]:
        hosts = self._hosts if host is None else [self._hosts[host]]
        pids = [pid for spaces in hosts for pid in spaces.pids() if _alive(pid)]
        return pids if rank is None else [pid for pid in pids if _rank_of(pid) == rank]

    def _reap_orphans(self) -> None:
        """Process 1 inherits orphans: take note of the ends of those that are no members."""
        ours = {process.pid for _, process in self._members}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in ours:
                    return
                os.waitpid(ended.si_pid, 0)


def _interfaces() -> dict[str, Any]:
    text = Path("/proc/self/net/dev").read_text(encoding="ascii")
    return {name: asdict(traffic) for name, traffic in read_interfaces(text).items()}


def _add_names(lines: str) -> None:
    """Let the lab's processes see /etc/hosts with these lines added."""
    if not _HOSTS_FILE.exists():
        return
    with tempfile.NamedTemporaryFile("w", prefix="thinwire-lab-", delete=True) as file:
        file.write(_HOSTS_FILE.read_text(encoding="utf-8").rstrip("\n") + "\n" + lines)
        file.flush()
        Path(file.name).chmod(0o644)
        subprocess.run(["mount", "--bind", file.name, str(_HOSTS_FILE)], check=True, capture_output=True, text=True)


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _rank_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"RANK=") and setting[5:].isdigit():
                return int(setting[5:])
    return None


def _answer(agent: Agent, line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    try:
        return {"ok": getattr(agent, request.pop("ask"))(**request)}
    except subprocess.CalledProcessError as error:
        return {"error": f"`{' '.join(error.cmd)}` said: {' '.join(error.stderr.split())}"}
    except (OSError, RuntimeError) as error:
        return {"error": str(error), "kind": type(error).__name__}


def serve(channel: socket.socket, owner: int) -> None:
    """Answer until the owner is gone or closes the channel."""
    agent, lines = Agent(), channel.makefile("rb")
    channel.sendall(b'{"ok": "ready"}\n')
    while True:
        ready, _, _ = select.select([channel.fileno(), owner], [], [])
        if owner in ready:
            return
        line = lines.readline()
        if not line.endswith(b"\n"):
            return
        channel.sendall(json.dumps(_answer(agent, line)).encode() + b"\n")


def main() -> NoReturn:
    """Serve, then end the lab: process 1 takes everything in its namespace with it."""
    _, _, channel, owner = sys.argv
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(socket.socket(fileno=int(channel)), int(owner))
    os._exit(0)


if __name__ == "__main__":
    main()
