"""A lab in words and tables: what it will be, what crossed its links, how its command ended.

How a command ended on the lab: exit status of every rank, who failed first, what crossed the links.

Show what a file gains, as `tail -f` does, without waiting.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from thinwire.lab import network
from thinwire.lab.config import LabConfig
from thinwire.lab.counters import Counters, Traffic
from thinwire.lab.network import show_limit
from thinwire.units import show_seconds

_TAIL_BYTES, _TAIL_LINES = 20_000, 15


@dataclass(frozen=True)
class RankEnd:
    """The end of one process. `rank` None: the launcher of a host."""

    host: int
    rank: int | None
    exit_status: int
    """What it returned; minus the signal's number if a signal ended it."""
    by: str
    """`itself`, `fault` (an injected one ended it), or `lab` (stopped because another failed or on request)."""
    log: Path

    @property
    def who(self) -> str:
        return f"host {self.host}" if self.rank is None else f"rank {self.rank} (host {self.host})"

    def tail(self) -> str:
        """The last lines of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    ends: tuple[RankEnd, ...]
    first_failure: RankEnd | None
    """The process that failed of itself before any other did."""
    wall_s: float
    traffic: Counters
    """From start to end."""

    @property
    def ok(self) -> bool:
        """Whether nobody failed of itself and nobody had to be stopped."""
        return self.first_failure is None and all(end.by == "fault" or end.exit_status == 0 for end in self.ends)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "wall_s": round(self.wall_s, 6),
            "ends": [{**asdict(end), "log": str(end.log)} for end in self.ends],
            "first_failure": None if self.first_failure is None else self.first_failure.who,
            "traffic": self.traffic.as_dict(),
        }


class Follow:
    """Copies what was appended to `path` since the last look to `out`."""

    def __init__(self, path: Path, out: IO[bytes]) -> None:
        self._path, self._out, self._offset = path, out, 0

    def look(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        if new:
            self._offset += len(new)
            self._out.write(new)
            self._out.flush()


def in_a_line(config: LabConfig) -> str:
    """`"2 hosts x 2 ranks, uplinks 100 Mbit/s"`."""
    rates = sorted({show_limit(config.rate_of(host)) for host in range(config.hosts)})
    sites = f", {config.sites} sites with uplinks {show_limit(config.site_rate)}" if config.sites else ""
    return f"{config.hosts} hosts x {config.ranks_per_host} ranks, uplinks {' or '.join(rates)}{sites}"


def plan(config: LabConfig, congestion: str) -> Iterator[str]:
    """What `build` would do: the hosts, then every command, after the namespace it runs in."""
    yield in_a_line(config)
    for host in range(config.hosts):
        first = host * config.ranks_per_host
        ranks = (
            f"ranks {first} to {first + config.ranks_per_host - 1}" if config.ranks_per_host > 1 else f"rank {first}"
        )
        place = "" if config.hosts_per_site is None else f", site {host // config.hosts_per_site}"
        yield f"  {network.host_name(host)}  {network.address(host)}  {show_limit(config.rate_of(host))}  {ranks}{place}"
    yield "commands, each in the namespace named before it:"
    for command in commands(config, congestion):
        where = "switches" if command.host is None else network.host_name(command.host)
        yield f"  {where:9} {' '.join(command.argv)}"


def commands(config: LabConfig, congestion: str) -> list[network.Command]:
    """What `build` would run, the namespaces called by the hosts' names."""
    names = {host: f"NAMESPACE-OF-{network.host_name(host)}" for host in range(config.hosts)}
    return list(network.build(config, names, congestion))


def summary(outcome: Outcome) -> Iterator[str]:
    """Time and bytes by link; then who ended otherwise than well."""
    yield f"ended after {show_seconds(outcome.wall_s)}; by the kernel's counters of each link:"
    for host, link in enumerate(outcome.traffic.hosts):
        yield f"  {network.host_name(host)}  {_traffic(link)}"
    for site, link in enumerate(outcome.traffic.sites):
        yield f"  site{site}  {_traffic(link)}"
    for end in outcome.ends:
        if end.exit_status or end.by != "itself":
            yield f"  {end.who} {how(end)}"


def how(end: RankEnd) -> str:
    """`"was killed by signal 9 (by a fault)"`."""
    what = f"was ended by signal {-end.exit_status}" if end.exit_status < 0 else f"ended with status {end.exit_status}"
    return what + {"itself": "", "fault": " (by a fault)", "lab": " (stopped by the lab)"}[end.by]


def failure(end: RankEnd) -> str:
    """Who failed first, and its last words."""
    tail = end.tail()
    words = f"; the end of {end.log}:\n{tail}" if tail else f"; {end.log} is empty"
    return f"{end.who} {how(end)}, first of all{words}"


def _traffic(link: Traffic) -> str:
    return f"sent {link.sent_bytes / 1e6:,.3f} MB, received {link.received_bytes / 1e6:,.3f} MB"
