"""What crossed each link, from the kernel's own counters of the interfaces."""

from dataclasses import asdict, dataclass
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
