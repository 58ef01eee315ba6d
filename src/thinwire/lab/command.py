"""One command on the lab's hosts, from its first process to its last: watched, sabotaged on schedule, stopped.

Where a process is, it is told in the variables that torchrun would set. Faults are data: when one is due, and the step a
run has reached, followed in its `events.jsonl`.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thinwire.errors import LabError
from thinwire.lab import network
from thinwire.lab.config import Fault, LabConfig
from thinwire.lab.host import Inside
from thinwire.lab.network import show_limit
from thinwire.lab.outcome import Counters, LabOutcome, RankEnd

FIRST_PORT = 29_500
_DROPPED = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "TORCHELASTIC_RUN_ID", "HOSTNAME")


@dataclass(frozen=True)
class Member:
    """One process to start: on which host, as which rank (None: one launcher for the whole host), with what variables."""

    host: int
    rank: int | None
    environment: Mapping[str, str]

    @property
    def log_name(self) -> str:
        return f"host-{self.host}.log" if self.rank is None else f"rank-{self.rank}.log"


def members(config: LabConfig, environment: Mapping[str, str], *, per_host: bool, port: int) -> Iterator[Member]:
    """Every process of one command: a rank each, or with `per_host` a launcher each. `environment` is the caller's."""
    kept = {key: value for key, value in environment.items() if key not in _DROPPED}
    for host in range(config.hosts):
        common = {**kept, **_of_host(config, host, port)}
        if per_host:
            yield Member(host, None, {**_without_rank(common), **_for_torchrun(config, host, port)})
            continue
        for local_rank in range(config.ranks_per_host):
            rank = host * config.ranks_per_host + local_rank
            yield Member(host, rank, {**common, **_of_rank(config, rank, local_rank)})


def _of_host(config: LabConfig, host: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": network.INTERFACE,
        "NCCL_SOCKET_IFNAME": network.INTERFACE,
        "OMP_NUM_THREADS": "1",
        "NNODES": str(config.hosts),
        "NODE_RANK": str(host),
        "GROUP_RANK": str(host),
        "PYTHONUNBUFFERED": "1",
    }


def _of_rank(config: LabConfig, rank: int, local_rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(config.ranks),
        "LOCAL_WORLD_SIZE": str(config.ranks_per_host),
    }


def _without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def _for_torchrun(config: LabConfig, host: int, port: int) -> dict[str, str]:
    """torchrun reads its own options from these."""
    return {
        "PET_NNODES": str(config.hosts),
        "PET_NODE_RANK": str(host),
        "PET_NPROC_PER_NODE": str(config.ranks_per_host),
        "PET_MASTER_ADDR": network.address(0),
        "PET_MASTER_PORT": str(port),
    }


class StepWatch:
    """The highest step in the records that an event file gained since this watch began; None before the first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offset = path.stat().st_size if path is not None and path.exists() else 0
        self._torn = b""
        self.step: int | None = None

    def look(self) -> int | None:
        """Read what is new."""
        if self._path is None or not self._path.exists():
            return self.step
        if self._path.stat().st_size < self._offset:  # put aside and begun anew
            self._offset, self._torn = 0, b""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._torn = (self._torn + new).split(b"\n")
        for step in _steps(lines):
            self.step = step if self.step is None else max(self.step, step)
        return self.step


def _steps(lines: Sequence[bytes]) -> Iterator[int]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") == "step" and isinstance(record.get("step"), int):
            yield record["step"]


def what(fault: Fault) -> str:
    """`"rate of host 1 to 20 Mbit/s"`, `"freeze rank 3"`."""
    named = ((name, getattr(fault, name)) for name in ("host", "site", "rank"))
    target = " ".join(f"{name} {index}" for name, index in named if index is not None)
    if fault.kind == "rate":
        return f"rate of {target} to {show_limit(fault.rate)}"
    return f"{fault.kind.replace('_host', '')} {target}"


def due(faults: Sequence[Fault], *, elapsed_s: float, step: int | None) -> tuple[list[Fault], list[Fault]]:
    """`(those that are due, the rest)`, both in the order in which they were given; due ones of a time by that time."""
    now = [fault for fault in faults if _is_due(fault, elapsed_s, step)]
    later = [fault for fault in faults if not _is_due(fault, elapsed_s, step)]
    return sorted(now, key=lambda fault: fault.at_s or 0.0), later


def _is_due(fault: Fault, elapsed_s: float, step: int | None) -> bool:
    if fault.at_s is not None:
        return elapsed_s >= fault.at_s
    return step is not None and fault.at_step is not None and step >= fault.at_step


_POLL_S, _GRACE_S, _TERM_S = 0.02, 2.0, 5.0


class Stage(Protocol):
    """What a running command needs of its lab."""

    @property
    def folder(self) -> Path: ...
    def counters(self) -> Counters: ...
    def inject(self, fault: Fault) -> None: ...
    def say(self, line: str) -> None: ...


class Running:
    """A command whose processes have been started."""

    def __init__(
        self,
        stage: Stage,
        agent: Inside,
        members: Sequence[Member],
        command: list[str],
        *,
        faults: Sequence[Fault],
        events: Path | None,
    ) -> None:
        self._stage, self._agent, self._members = stage, agent, members
        self._pending, self._watch = list(faults), StepWatch(events)
        self._blamed: dict[int, str] = {}
        self._first: int | None = None
        self._statuses: list[int | None] = [None] * len(members)
        self._before = stage.counters()
        for stale in stage.folder.glob("*.log"):
            stale.unlink()
        cwd = str(Path.cwd())
        self._started_s = time.monotonic()
        try:
            for member in members:
                log, environment = str(self.log(member).absolute()), dict(member.environment)
                agent.ask("spawn", host=member.host, argv=command, environment=environment, cwd=cwd, log=log)
        except BaseException:
            agent.ask("clear")
            raise
        self._ended_s: float | None = None

    @property
    def over(self) -> bool:
        """Whether every process has ended, as far as was looked."""
        return all(status is not None for status in self._statuses)

    def log(self, member: Member) -> Path:
        return self._stage.folder / member.log_name

    @property
    def statuses(self) -> tuple[int | None, ...]:
        """Exit status of every process as of the last look, None while it runs."""
        return tuple(self._statuses)

    @property
    def first_log(self) -> Path:
        """The log of rank 0 (or of the first host's launcher)."""
        return self.log(self._members[0])

    def look(self) -> bool:
        """Inject the faults that are due, note who ended; True when all have."""
        elapsed_s = time.monotonic() - self._started_s
        now, self._pending = due(self._pending, elapsed_s=elapsed_s, step=self._watch.look())
        for fault in now:
            self._inject(fault)
        self._note(self._agent.ask("status"))
        if self.over and self._ended_s is None:
            self._ended_s = time.monotonic()
        return self.over

    def wait(
        self,
        *,
        timeout_s: float | None = None,
        keep_going: bool = False,
        each_look: Callable[[], None] = lambda: None,
    ) -> LabOutcome:
        """See `Lab.wait`; `each_look` is called every few hundredths of a second."""
        while not self.look():
            each_look()
            if self._first is not None and not keep_going:
                self._give_up()
            elif timeout_s is not None and time.monotonic() - self._started_s > timeout_s:
                self.stop("lab")
                raise LabError(f"the command did not end in {timeout_s:g} s and was stopped")
            else:
                time.sleep(_POLL_S)
        each_look()
        return self._outcome()

    def interrupt(self, number: signal.Signals) -> None:
        """Pass a signal on to every process."""
        self._blame_rest("lab")
        self._agent.ask("signal", number=int(number))

    def kill(self) -> None:
        """End every process at once."""
        self._blame_rest("lab")
        self._agent.ask("signal", number=int(signal.SIGKILL))

    def stop(self, by: str) -> None:
        """End every process that still runs: kindly, then not."""
        self._blame_rest(by)
        self._agent.ask("signal", number=int(signal.SIGTERM))
        self._agent.ask("signal", number=int(signal.SIGCONT))
        self._look_for(_TERM_S)
        self._agent.ask("signal", number=int(signal.SIGKILL))
        self._look_for(_TERM_S)

    def blame_fault(self, is_meant: Callable[[int, int | None], bool]) -> None:
        """From now on the ends of these processes (by host and rank) are the fault's doing, not their own."""
        for number, member in enumerate(self._members):
            if self._statuses[number] is None and is_meant(member.host, member.rank):
                self._blamed.setdefault(number, "fault")

    def _inject(self, fault: Fault) -> None:
        when = f"at step {fault.at_step}" if fault.at_step is not None else f"at {fault.at_s:g} s"
        self._stage.say(f"fault {when}: {what(fault)}")
        try:
            self._stage.inject(fault)
        except LabError as error:
            self._stage.say(f"fault {when} had nothing to act on: {error}")

    def _note(self, statuses: list[int | None]) -> None:
        fresh = [n for n, status in enumerate(statuses) if status is not None and self._statuses[n] is None]
        self._statuses = list(statuses)
        failed = [n for n in fresh if statuses[n] and n not in self._blamed]
        if failed and self._first is None:
            self._first = failed[0]

    def _give_up(self) -> None:
        """One failed of itself: let the others say what they saw, then end them."""
        self._look_for(_GRACE_S)
        self.stop("lab")

    def _look_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while not self.look() and time.monotonic() < end_s:
            time.sleep(_POLL_S)

    def _blame_rest(self, by: str) -> None:
        for number, status in enumerate(self._statuses):
            if status is None:
                self._blamed.setdefault(number, by)

    def _outcome(self) -> LabOutcome:
        ends = tuple(
            RankEnd(member.host, member.rank, status or 0, self._blamed.get(number, "itself"), self.log(member))
            for number, (member, status) in enumerate(zip(self._members, self._statuses, strict=True))
        )
        wall_s = (self._ended_s or time.monotonic()) - self._started_s
        first = None if self._first is None else ends[self._first]
        return LabOutcome(ends, first, wall_s, self._stage.counters() - self._before)
