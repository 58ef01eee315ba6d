"""How a command ended on the lab: every rank's exit status, who failed first, what the kernel counted on the links."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """Bytes and packets of one link, seen from the host or site it belongs to. Large segments count as one packet."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
            self.sent_packets - earlier.sent_packets,
            self.received_packets - earlier.received_packets,
        )


@dataclass(frozen=True)
class Counters:
    """All links of a lab at one moment; subtract an earlier one for what happened between."""

    hosts: tuple[Traffic, ...]
    sites: tuple[Traffic, ...] = ()

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            tuple(now - then for now, then in zip(self.hosts, earlier.hosts, strict=True)),
            tuple(now - then for now, then in zip(self.sites, earlier.sites, strict=True)),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_interfaces(text: str) -> dict[str, Traffic]:
    """The contents of /proc/net/dev: traffic by interface."""
    found = {}
    for line in text.splitlines()[2:]:
        name, _, figures = line.partition(":")
        column = [int(word) for word in figures.split()]
        found[name.strip()] = Traffic(column[8], column[0], column[9], column[1])
    return found


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
class LabOutcome:
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
