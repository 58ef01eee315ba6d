"""What each rank is doing, for the others to ask when a collective does not end.

A rank's main thread notes what it does in a few assignments. A thread that sleeps until somebody calls answers from
these notes, so that a rank stuck in a data loader or in an endless loop can still be told from one that has ended, is
stopped, or cannot be reached. Nothing is sent while all goes well.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from thinwire.comm.ledger import Entry
from thinwire.units import SYSTEM_CLOCK, SystemClock

_LINE_BYTES, _CALLER_S = 65536, 1.0
_IN_WORDS = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_reduce": "all-reduce"}


class Status:
    """One rank's notes. `verdict` is what another rank, or this one, has found to be the reason of a failure."""

    def __init__(self, clock: SystemClock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._phase, self._since_s = "its own work", self._clock.now()
        self._step: int | None = None
        self._awaited: Entry | str | None = None
        self._waits_since_s, self._collectives = 0.0, 0
        self.verdict: dict[str, Any] | None = None

    def enter(self, phase: str, step: int | None = None) -> None:
        """From now on this rank is in `phase`, such as "its data step", of step number `step` (1 is the first)."""
        self._phase, self._step, self._since_s = phase, step, self._clock.now()

    def wait(self, awaited: Entry | str) -> None:
        """It waits for others, in a collective."""
        self._waits_since_s, self._awaited = self._clock.now(), awaited

    def waited(self) -> None:
        """The others have come."""
        self._awaited = None
        self._collectives += 1

    def snapshot(self) -> dict[str, Any]:
        """The notes as they are now; times are how many seconds ago."""
        now_s, awaited = self._clock.now(), self._awaited
        return {
            "phase": self._phase,
            "step": self._step,
            "phase_s": now_s - self._since_s,
            "waiting": awaited if awaited is None else _words(awaited),
            "waiting_s": now_s - self._waits_since_s,
            "collectives": self._collectives,
            "verdict": self.verdict,
        }


def _words(awaited: Entry | str) -> str:
    if isinstance(awaited, str):
        return awaited
    kind = _IN_WORDS.get(awaited.kind, awaited.kind.replace("_", "-"))
    return f"the {kind} ({awaited.purpose}) at level {awaited.level}"


class StatusServer:
    """Answers whoever knows the world's token: who is here, and what it is doing. Takes verdicts of others.

    Listens on every address of this machine, as the one at which others reach it is not known yet.
    """

    def __init__(self, rank: int, status: Status) -> None:
        self.rank, self.status, self.token = rank, status, ""
        self._socket = _listen()
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="status", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            with caller, contextlib.suppress(OSError, ValueError, KeyError):
                caller.settimeout(_CALLER_S)
                self._answer(caller)

    def _answer(self, caller: socket.socket) -> None:
        with caller.makefile("rb") as lines:
            asked = json.loads(lines.readline(_LINE_BYTES))
        if asked["token"] != self.token:
            return
        if "verdict" in asked and self.status.verdict is None:
            self.status.verdict = asked["verdict"]
        caller.sendall(json.dumps({"rank": self.rank, **self.status.snapshot()}).encode() + b"\n")


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def call(
    ip: str, port: int, request: dict[str, Any], timeout_s: float, connected: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """What the server at an address answers; `connected` is called in between. Raises OSError (TimeoutError among them)."""
    with socket.create_connection((ip, port), timeout_s) as line:
        connected()
        line.settimeout(timeout_s)
        line.sendall(json.dumps(request).encode() + b"\n")
        with line.makefile("rb") as lines:
            text = lines.readline(_LINE_BYTES)
    if not text.endswith(b"\n"):
        raise ConnectionResetError("another program answers there")
    answer: dict[str, Any] = json.loads(text)
    return answer
