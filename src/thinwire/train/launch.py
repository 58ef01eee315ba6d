"""Start the ranks of a run on this machine, pass stop signals on, and tell whose fault an end was. No torch here.

Each rank is a process of its own session, so that a Ctrl-C in the terminal reaches only this launcher. A rank that fails
leaves a report; the launcher stops the rest within seconds and shows the root cause first, not the collectives that
broke because of it. A rank whose launcher vanishes notices the closed pipe and leaves.

Failure reports: what a rank leaves when it fails, and which of several reports is the root cause. No torch here.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from thinwire.comm.place import Place
from thinwire.errors import ConfigError, LinkError, RankLost, ThinwireError
from thinwire.files.folders import scratch_folder, write_atomic
from thinwire.train.folder import LOGS
from thinwire.train.stop import INTERRUPTED_STATUS, STOP_SIGNALS, held_for_children
from thinwire.units import SYSTEM_CLOCK, SystemClock


@dataclass(frozen=True)
class FailureReport:
    """One rank's end. `sentence` is for people; `details` is the traceback of an error that is not a known one."""

    rank: int
    time_s: float
    sentence: str
    details: str
    exit_status: int
    needed_bytes: int = field(default=0, kw_only=True)
    """Of a rank that ran out of memory: what it needed at least."""
    capacity_bytes: int = field(default=0, kw_only=True)
    """And what there is."""
    cascade: bool
    """True if this is the echo of another rank's failure."""
    names_a_rank: bool = False
    """True if the sentence says itself which rank it is about."""

    def write(self, path: Path) -> None:
        """Whole or not at all: the launcher may read it when this process is killed, or the disk is full."""
        with suppress(OSError):
            write_atomic(path, json.dumps(asdict(self)))


def describe(rank: int, error: BaseException) -> FailureReport:
    """The report of an exception. Known errors need no traceback; anything else is shown whole."""
    known = isinstance(error, ThinwireError)
    text = str(error) or type(error).__name__
    return FailureReport(
        rank=rank,
        time_s=time.time(),
        sentence=text if known else f"{type(error).__name__}: {text.splitlines()[0]}",
        details="" if known else "".join(traceback.format_exception(error)),
        needed_bytes=getattr(error, "needed_bytes", 0),
        capacity_bytes=getattr(error, "capacity_bytes", 0),
        exit_status=error.exit_status if isinstance(error, ThinwireError) else 1,
        cascade=isinstance(error, RankLost),
        names_a_rank=isinstance(error, LinkError),
    )


def root_cause(reports: Path, died: Mapping[int, int], logs: Path) -> FailureReport:
    """Of all that is known, what came first: a rank ended by a signal, then the earliest failure that is no echo.

    `died` maps ranks to the signal that ended them.
    """
    for rank, number in sorted(died.items()):
        name = signal.Signals(number).name
        hint = "; the system may have run out of memory (see dmesg)" if number == signal.SIGKILL else ""
        return FailureReport(rank, time.time(), f"was ended by {name}{hint}", "", 1, False)
    found = [FailureReport(**json.loads(path.read_text(encoding="utf-8"))) for path in reports.glob("*.json")]
    if not found:
        return FailureReport(-1, time.time(), f"a rank left without saying why; see {logs}", "", 1, False)
    return min(found, key=lambda report: (report.cascade, report.time_s))


_POLL_S, _GRACE_S, _KILL_S = 0.05, 2.0, 5.0
_FIRST_PORT, _OUTGOING, _TRIES = 20_000, 32_768, 50
"""Where free ports are looked for: from the first up to those of outgoing connections (Linux's default is given)."""


@dataclass(frozen=True)
class Ending:
    """How the ranks ended: an exit status, and whose failure it was if it was one."""

    status: int
    failure: FailureReport | None = None


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on at this moment, of those that are not handed out to anybody's outgoing connections.

    Ranks take seconds to start, in which the kernel may give one of the latter away.
    """
    for port in random.SystemRandom().sample(range(_FIRST_PORT, _first_outgoing()), k=_TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _first_outgoing() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = _OUTGOING
    return max(first, _FIRST_PORT + _TRIES)


@dataclass(frozen=True)
class LocalRanks:
    """The ranks of a world that one launcher starts: `first` .. `first + count - 1` of `size`, which meet at host:port."""

    first: int
    count: int
    size: int
    host: str
    port: int

    @staticmethod
    def whole(ranks: int, port: int | None = None) -> "LocalRanks":
        """All ranks, on this machine."""
        return LocalRanks(0, ranks, ranks, "127.0.0.1", port or free_port())

    @staticmethod
    def of_node(place: Place, ranks_per_node: int) -> "LocalRanks":
        """Those of one node, for a launcher that is itself one of `place.size` (one a node)."""
        return LocalRanks(
            place.rank * ranks_per_node, ranks_per_node, place.size * ranks_per_node, place.host, place.port
        )


WORKER = "thinwire.train.worker"


def launch(
    arguments: Sequence[str], *, share: LocalRanks, folder: Path, worker: str = WORKER, lock: int | None = None
) -> Ending:
    """Run `python -m WORKER PLACE ARGUMENTS` as the ranks of `share` and wait for their end.

    Rank 0 shares this process's output; the others write to `folder/logs/rank-N.log`. `lock`: a descriptor that every
    rank holds open while it lives.
    """
    with (
        scratch_folder() as reports,
        RankProcesses(arguments, share=share, folder=folder, reports=reports, worker=worker, lock=lock) as processes,
    ):
        return processes.wait()


class RankProcesses:
    """The processes of one launch. A context: leaving it leaves no process behind."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        share: LocalRanks,
        folder: Path,
        reports: Path,
        worker: str = WORKER,
        lock: int | None = None,
        clock: SystemClock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._worker, self._lock = worker, lock
        self._arguments, self._share, self._reports = list(arguments), share, reports
        self._logs = folder / LOGS
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stops = 0

    def __enter__(self) -> "RankProcesses":
        self._logs.mkdir(parents=True, exist_ok=True)
        self._before = {number: signal.signal(number, self._on_stop) for number in STOP_SIGNALS}
        watched, self._alive = os.pipe()
        with held_for_children():
            for local_rank in range(self._share.count):
                self._processes.append(self._start(local_rank, watched))
        os.close(watched)
        return self

    def __exit__(self, *error: object) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        os.close(self._alive)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> Ending:
        """Until all ranks ended, or one failed and the others were stopped."""
        while self._running():
            if any(process.poll() not in (None, 0) for process in self._processes):
                return self._stop_rest()
            self._clock.sleep(_POLL_S)
        if any(process.returncode for process in self._processes):
            return self._stop_rest()
        return Ending(0)

    def _start(self, local_rank: int, watched: int) -> subprocess.Popen[bytes]:
        share, rank = self._share, self._share.first + local_rank
        place = Place(rank=rank, size=share.size, local_rank=local_rank, host=share.host, port=share.port)
        own = {"place": asdict(place), "report": str(self._reports / f"{rank}.json"), "launcher_pipe": watched}
        command = [sys.executable, "-m", self._worker, json.dumps(own), *self._arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(self._threads())}
        output = None if rank == 0 else (self._logs / f"rank-{rank}.log").open("ab")
        try:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(watched,) if self._lock is None else (watched, self._lock),
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()

    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self._share.count)

    def _on_stop(self, number: int, frame: object) -> None:
        self._stops += 1
        if self._stops > 1 and number == signal.SIGINT:
            self._signal(signal.SIGKILL)
            os._exit(INTERRUPTED_STATUS)
        self._signal(signal.Signals(number))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _stop_rest(self) -> Ending:
        """One rank failed: give the others a moment to say what they saw, then end them and name the culprit."""
        self._wait_at_most(_GRACE_S)
        died = {
            self._share.first + local_rank: -process.returncode
            for local_rank, process in enumerate(self._processes)
            if process.returncode is not None and process.returncode < 0
        }
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # one that is stopped would not hear it
        self._wait_at_most(_KILL_S if not died else 1.0)
        self._signal(signal.SIGKILL)
        failure = root_cause(self._reports, died, self._logs)
        return Ending(failure.exit_status, failure)

    def _wait_at_most(self, seconds: float) -> None:
        end_s = self._clock.now() + seconds
        while self._running() and self._clock.now() < end_s:
            self._clock.sleep(_POLL_S)


def refuse_taken(port: int) -> None:
    """Raise ConfigError if somebody listens on `port` already."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"port {port} cannot be used: {reason}; choose another with --port, or leave it out"
            ) from None
