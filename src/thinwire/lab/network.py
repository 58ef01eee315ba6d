"""From a lab's description to the commands that build it. Pure functions: what they return is shown, run and tested.

    host h: eth0 ==veth== h0 .. on its switch ── the one switch `root`, or the site's switch `s0` ==veth== `root`

A host is a network namespace (None: the lab's own namespace, where the switches are). A host's egress is limited at its
eth0, its ingress at the port of the switch; the same for a site at both ends of its uplink.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from thinwire.lab import shaping
from thinwire.lab.config import LabConfig

NETWORK, ROOT_SWITCH, INTERFACE = "10.88.0", "root", "eth0"


@dataclass(frozen=True)
class Command:
    """A program to run inside a host's namespace, or in the lab's own (None)."""

    host: int | None
    argv: tuple[str, ...]


def address(host: int) -> str:
    return f"{NETWORK}.{host + 1}"


def host_name(host: int) -> str:
    return f"host{host}"


def port(host: int) -> str:
    """The switch port that leads to a host."""
    return f"h{host}"


def uplink(site: int) -> str:
    """The end of a site's uplink that is on the site's switch; what it transmits leaves the site."""
    return f"s{site}-up"


def downlink(site: int) -> str:
    """The end of a site's uplink that is on the root switch."""
    return f"s{site}-down"


def build(config: LabConfig, namespaces: Mapping[int, str], congestion: str) -> Iterator[Command]:
    """Every command, in order. `namespaces`: what `ip link set ... netns` calls each host's; `congestion`: TCP's control."""
    yield from _switch(ROOT_SWITCH)
    for site in range(config.sites):
        yield from _site(config, site)
    for host in range(config.hosts):
        yield from _host(config, host, namespaces[host], congestion)


def _ip(*words: str, host: int | None = None) -> Command:
    return Command(host, ("ip", *words))


def _switch(name: str) -> Iterator[Command]:
    yield _ip("link", "add", name, "type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
    yield _ip("link", "set", name, "addrgenmode", "none", "up")


def _cable(one: str, other: str) -> Command:
    return _ip("link", "add", one, "type", "veth", "peer", "name", other)


def _plug(interface: str, switch: str) -> Command:
    segment = str(shaping.SEGMENT_BYTES)
    return _ip("link", "set", interface, "master", switch, "addrgenmode", "none", "gso_max_size", segment, "up")


def _site(config: LabConfig, site: int) -> Iterator[Command]:
    yield from _switch(f"s{site}")
    yield _cable(uplink(site), downlink(site))
    yield _plug(uplink(site), f"s{site}")
    yield _plug(downlink(site), ROOT_SWITCH)
    if config.site_rate is not None:
        yield from site_rate(site, config.site_rate, config.burst)


def _host(config: LabConfig, host: int, namespace: str, congestion: str) -> Iterator[Command]:
    switch = ROOT_SWITCH if config.hosts_per_site is None else f"s{host // config.hosts_per_site}"
    inside = f"e{host}"
    yield _cable(port(host), inside)
    yield _ip("link", "set", inside, "netns", namespace)
    yield _plug(port(host), switch)
    yield _ip("link", "set", "lo", "up", host=host)
    yield _ip("link", "set", inside, "name", INTERFACE, host=host)
    yield _ip("link", "set", INTERFACE, "gso_max_size", str(shaping.SEGMENT_BYTES), "addrgenmode", "none", host=host)
    yield _ip("link", "set", INTERFACE, "up", host=host)
    yield _ip("address", "add", f"{address(host)}/24", "dev", INTERFACE, "noprefixroute", host=host)
    route = (f"{NETWORK}.0/24", "dev", INTERFACE, "src", address(host))
    yield _ip("route", "add", *route, "congctl", congestion, host=host)
    rate = config.rate_of(host)
    if rate is not None:
        yield from host_rate(host, rate, config.burst)
    if config.delay is not None:
        yield Command(host, shaping.delay(INTERFACE, config.delay, under_limit=rate is not None))


def host_rate(host: int, bytes_per_s: float | None, burst: int | None = None) -> Iterator[Command]:
    """Give a host's link a rate both ways, or none."""
    yield Command(host, shaping.limit(INTERFACE, bytes_per_s, burst))
    yield Command(None, shaping.limit(port(host), bytes_per_s, burst))


def site_rate(site: int, bytes_per_s: float | None, burst: int | None = None) -> Iterator[Command]:
    """Give a site's uplink a rate both ways, or none."""
    yield Command(None, shaping.limit(uplink(site), bytes_per_s, burst, shared=True))
    yield Command(None, shaping.limit(downlink(site), bytes_per_s, burst, shared=True))


def plug_host(host: int, *, up: bool) -> Command:
    """Pull a host's cable out of the switch, or put it back."""
    return _ip("link", "set", port(host), "up" if up else "down")


def plug_site(site: int, *, up: bool) -> Command:
    """The same for a site's uplink."""
    return _ip("link", "set", downlink(site), "up" if up else "down")


def hosts_file(config: LabConfig) -> str:
    """Lines of /etc/hosts, so that every host's name resolves on every host."""
    return "".join(f"{address(host)} {host_name(host)}\n" for host in range(config.hosts))
