"""The inside of a lab, seen from its owner: namespaces with the agent as process 1, and a channel to ask it.

By default rootless: a user namespace makes this user root of nothing but the lab. A process that may administrate the
machine needs none. No name is left in the file system, and when the owner dies, however it dies, so does the inside.

A lab's name: a prefix, and which process owns it, so that what is left over can be told from what is in use.
"""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from thinwire.errors import LabError
from thinwire.files.processes import start_ticks
from thinwire.lab.tools import may_administrate, search_path, why_no_namespaces

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
