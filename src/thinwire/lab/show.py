"""A lab in words and tables: what it will be, what crossed its links, how its command ended.

Show what a file gains, as `tail -f` does, without waiting.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from thinwire.lab import network
from thinwire.lab.config import LabConfig
from thinwire.lab.network import show_limit
from thinwire.lab.outcome import LabOutcome, RankEnd, Traffic
from thinwire.units import show_seconds


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


def summary(outcome: LabOutcome) -> Iterator[str]:
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
