"""The inside of a lab, seen from its owner: namespaces with the agent as process 1, and a channel to ask it.

By default rootless: a user namespace makes this user root of nothing but the lab. A process that may administrate the
machine needs none; what a machine lacks, it says in a sentence. No name is left in the file system, and when the owner
dies, however it dies, so does the inside.

A lab's name says which process owns it, so that what is left over can be told from what is in use, and removed. Usually
nothing is: what can stay is a lab whose agent was stopped or hung in the kernel as its owner died, and the temporary
folder of its logs.
"""

import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.errors import LabError
from thinwire.files.folders import start_ticks

AGENT = "thinwire.lab.agent"
_START_S, _END_S = 30.0, 10.0


class Inside:
    """A running agent. Make it with `Inside.open`, end it with `close`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.name, self._process, self._channel = name, process, channel
        self._lines = channel.makefile("rb")

    @staticmethod
    def open(name: str, *, rootless: bool | None = None) -> "Inside":
        """Make the namespaces and wait for the agent. `rootless` None: only if this process is no administrator.

        Raises LabError that says what this machine lacks.
        """
        if rootless is None:
            rootless = not may_administrate(Path("/proc/self/status").read_text(encoding="ascii"))
        ours, theirs = socket.socketpair()
        owner = os.pidfd_open(os.getpid())
        try:
            process = subprocess.Popen(
                _command(name, theirs.fileno(), owner, rootless=rootless),
                env={**os.environ, "PATH": search_path(os.environ.get("PATH", ""))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), owner),
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(owner)
        inside = Inside(name, process, ours)
        inside._await_agent(rootless)
        return inside

    def ask(self, what: str, **arguments: Any) -> Any:
        """One request of `thinwire.lab.agent.Agent`. Raises LabError with what went wrong there."""
        try:
            self._channel.sendall(json.dumps({"ask": what, **arguments}).encode() + b"\n")
            line = self._lines.readline()
        except OSError:
            line = b""
        if not line:
            raise LabError(
                f"the lab {self.name} is gone: {self._last_words() or 'its process was killed from outside'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise LabError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        """End everything inside; returns when its last process is gone."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._channel.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _last_words(self) -> str:
        """The error that ended the agent, if it was one of its own."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
            said = self._process.stderr.read().decode(errors="replace") if self._process.stderr else ""
            return said.partition("Traceback")[2].strip().rpartition("\n")[2]
        return ""

    def _await_agent(self, rootless: bool) -> None:
        ready, _, _ = select.select([self._channel], [], [], _START_S)
        if ready and self._lines.readline():
            return
        self._process.kill()
        said = self._process.stderr.read().decode(errors="replace") if self._process.stderr else ""
        self.close()
        last = said.strip().splitlines()[-1] if said.strip() else f"no answer in {_START_S:.0f} s"
        raise LabError(why_no_namespaces(last, rootless=rootless))


def _command(name: str, channel: int, owner: int, *, rootless: bool) -> list[str]:
    user = ["--user", "--map-root-user"] if rootless else []
    spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    agent = [sys.executable, "-m", AGENT, name, str(channel), str(owner)]
    return ["unshare", *user, *spaces, "--", *agent]


PREFIX = "thinwire-lab-"


def new_name() -> str:
    """A name for a lab of this process: `thinwire-lab-PID-START-RANDOM`."""
    return f"{PREFIX}{os.getpid()}-{start_ticks(os.getpid())}-{secrets.token_hex(3)}"


def is_name(text: str) -> bool:
    parts = text.removeprefix(PREFIX).split("-")
    return text.startswith(PREFIX) and len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit()


def owner_lives(name: str) -> bool:
    """Whether the process that made the lab `name` still runs."""
    pid, ticks, _ = name.removeprefix(PREFIX).split("-")
    return start_ticks(int(pid)) == int(ticks)


_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "mount": "util-linux"}
_ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_SYS_ADMIN, _NET_ADMIN = 1 << 21, 1 << 12
_SETTINGS = {
    "kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=10000"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
}


def search_path(path: str) -> str:
    """PATH with the administrators' folders, where Debian keeps `ip` and `tc`."""
    return f"{path}:{_ADMIN_PATH}"


def check_machine(environment: Mapping[str, str]) -> None:
    """Raise LabError on another system than Linux, or if a program is missing."""
    if sys.platform != "linux":
        raise LabError("the lab needs Linux (network namespaces and tc); use a Linux machine or a virtual one")
    path = search_path(environment.get("PATH", ""))
    missing = [program for program in _PACKAGES if shutil.which(program, path=path) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES[program] for program in missing}))
        raise LabError(f"the lab needs {' and '.join(missing)}; install them, on Debian: apt-get install {packages}")


def may_administrate(status: str) -> bool:
    """Whether the process whose /proc/PID/status this is may make namespaces and interfaces without a user namespace."""
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16) & (_SYS_ADMIN | _NET_ADMIN) == _SYS_ADMIN | _NET_ADMIN


def why_no_namespaces(said: str, *, rootless: bool, proc_sys: Path = Path("/proc/sys")) -> str:
    """The sentence for namespaces that could not be made; `said` is what `unshare` or `ip` said."""
    if rootless:
        for key, (bad, remedy) in _SETTINGS.items():
            setting = proc_sys / key
            if setting.exists() and setting.read_text(encoding="ascii").strip() == bad:
                return (
                    f"this kernel gives user namespaces to root only ({key.replace('/', '.')} = {bad}: {said}); "
                    f"run `sudo {remedy}`, or run the lab as root"
                )
    way = "run the lab as root" if rootless else "the lab needs them as root too"
    return (
        f"this machine does not let the lab make its namespaces ({said}); {way}, in a container with "
        f"--cap-add SYS_ADMIN --cap-add NET_ADMIN and without a seccomp profile"
    )


def why_command_failed(said: str) -> str:
    """The sentence for a network command that failed while the lab was being built."""
    for mark, module, thing in (
        ("netem", "sch_netem", "delay"),
        ("tbf", "sch_tbf", "a rate"),
        ("veth", "veth", "links"),
        ("bridge", "bridge", "switches"),
    ):
        unknown = "kind is unknown" in said or "Unknown device type" in said
        if mark in said and (unknown or "not supported" in said):
            return f"this kernel has no {mark} (module {module}), which the lab needs for {thing}"
    return f"the lab could not be built: {said}"


@dataclass(frozen=True)
class FoundLab:
    """A lab of this user on this machine. `pid`: the process that holds it; None: only `folder` is left."""

    name: str
    alive: bool
    """Whether its owner still runs."""
    pid: int | None
    folder: Path | None


def find() -> list[FoundLab]:
    """All labs of this user, those in use too."""
    holders = dict(_holders())
    folders = {path.name: path for path in Path(tempfile.gettempdir()).iterdir() if is_name(path.name) and _ours(path)}
    names = sorted({*holders, *folders})
    return [FoundLab(name, owner_lives(name), holders.get(name), folders.get(name)) for name in names]


def remove(lab: FoundLab) -> None:
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
