"""From a lab's description to the commands that build it. Pure functions: what they return is shown, run and tested.

    host h: eth0 ==veth== h0 .. on its switch ── the one switch `root`, or the site's switch `s0` ==veth== `root`

A host is a network namespace (None: the lab's own namespace, where the switches are). A host's egress is limited at its
eth0, its ingress at the port of the switch; the same for a site at both ends of its uplink.

At one end of a link `tc` sets a token bucket (tbf) for its rate and netem for its delay. Two ends make a direction: the
sender's own interface, and the port of the switch that leads to the receiver. The limiter counts the headers of every
segment (66 bytes of TCP, IP and Ethernet per 1,448), the interfaces' own counters see the large segments before they are
cut, and so few headers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from thinwire.lab.config import LabConfig
from thinwire.units import show_rate

SEGMENT_BYTES = 16 * 2**10
"""Largest segment TCP hands to a lab link: small, so that a slow link's bucket can be small too."""
_HEADERS = 1.06
"""A segment as the bucket counts it, headers included, over its bytes."""
_BURST_S = 0.004


def burst_bytes(bytes_per_s: float, given: int | None = None) -> int:
    """Size of the bucket: 4 ms of the rate, but at least one large segment, lest the kernel cuts it up."""
    return given or max(round(SEGMENT_BYTES * _HEADERS) + 1514, round(bytes_per_s * _BURST_S))


def queue_bytes(bytes_per_s: float, burst: int, *, shared: bool = False) -> int:
    """What may wait for the link; more is dropped, as a switch does.

    At a host's own link 100 ms of its rate: its TCP sees that queue and keeps it short by itself. At a link that hosts
    share (a site's uplink) 5 ms: senders do not see it, fill whatever there is, and the acknowledgements of the other
    direction wait behind it, which starves that direction (1.7 times the time with 100 ms at 80 Mbit/s, 1.1 with 5).
    """
    seconds, segments = (0.005, 3) if shared else (0.1, 8)
    return burst + max(segments * SEGMENT_BYTES, round(bytes_per_s * seconds))


def limit(
    interface: str, bytes_per_s: float | None, burst: int | None = None, *, shared: bool = False
) -> tuple[str, ...]:
    """The command that gives an interface a rate, or takes it away (None). What waits in a changed limiter stays."""
    replace = ("tc", "qdisc", "replace", "dev", interface, "root")
    if bytes_per_s is None:
        return (*replace, "noqueue")
    bucket = burst_bytes(bytes_per_s, burst)
    rate = f"{round(bytes_per_s * 8)}bit"
    waiting = str(queue_bytes(bytes_per_s, bucket, shared=shared))
    return (*replace, "handle", "1:", "tbf", "rate", rate, "burst", str(bucket), "limit", waiting)


def delay(interface: str, seconds: float, *, under_limit: bool) -> tuple[str, ...]:
    """The command that delays what leaves an interface, inside its limiter if it has one."""
    parent = ("parent", "1:1") if under_limit else ("root",)
    return ("tc", "qdisc", "add", "dev", interface, *parent, "netem", "delay", f"{round(seconds * 1e6)}us")


def show_limit(bytes_per_s: float | None) -> str:
    """`"100 Mbit/s"` or `"unlimited"`."""
    return "unlimited" if bytes_per_s is None else show_rate(bytes_per_s)


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
    segment = str(SEGMENT_BYTES)
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
    yield _ip("link", "set", INTERFACE, "gso_max_size", str(SEGMENT_BYTES), "addrgenmode", "none", host=host)
    yield _ip("link", "set", INTERFACE, "up", host=host)
    yield _ip("address", "add", f"{address(host)}/24", "dev", INTERFACE, "noprefixroute", host=host)
    route = (f"{NETWORK}.0/24", "dev", INTERFACE, "src", address(host))
    yield _ip("route", "add", *route, "congctl", congestion, host=host)
    rate = config.rate_of(host)
    if rate is not None:
        yield from host_rate(host, rate, config.burst)
    if config.delay is not None:
        yield Command(host, delay(INTERFACE, config.delay, under_limit=rate is not None))


def host_rate(host: int, bytes_per_s: float | None, burst: int | None = None) -> Iterator[Command]:
    """Give a host's link a rate both ways, or none."""
    yield Command(host, limit(INTERFACE, bytes_per_s, burst))
    yield Command(None, limit(port(host), bytes_per_s, burst))


def site_rate(site: int, bytes_per_s: float | None, burst: int | None = None) -> Iterator[Command]:
    """Give a site's uplink a rate both ways, or none."""
    yield Command(None, limit(uplink(site), bytes_per_s, burst, shared=True))
    yield Command(None, limit(downlink(site), bytes_per_s, burst, shared=True))


def plug_host(host: int, *, up: bool) -> Command:
    """Pull a host's cable out of the switch, or put it back."""
    return _ip("link", "set", port(host), "up" if up else "down")


def plug_site(site: int, *, up: bool) -> Command:
    """The same for a site's uplink."""
    return _ip("link", "set", downlink(site), "up" if up else "down")


def hosts_file(config: LabConfig) -> str:
    """Lines of /etc/hosts, so that every host's name resolves on every host."""
    return "".join(f"{address(host)} {host_name(host)}\n" for host in range(config.hosts))


def in_a_line(config: LabConfig) -> str:
    """`"2 hosts x 2 ranks, uplinks 100 Mbit/s"`."""
    rates = sorted({show_limit(config.rate_of(host)) for host in range(config.hosts)})
    sites = f", {config.sites} sites with uplinks {show_limit(config.site_rate)}" if config.sites else ""
    return f"{config.hosts} hosts x {config.ranks_per_host} ranks, uplinks {' or '.join(rates)}{sites}"


def described(config: LabConfig, congestion: str) -> Iterator[str]:
    """What `build` would do: the hosts, then every command, after the namespace it runs in."""
    yield in_a_line(config)
    for host in range(config.hosts):
        first = host * config.ranks_per_host
        ranks = (
            f"ranks {first} to {first + config.ranks_per_host - 1}" if config.ranks_per_host > 1 else f"rank {first}"
        )
        place = "" if config.hosts_per_site is None else f", site {host // config.hosts_per_site}"
        yield f"  {host_name(host)}  {address(host)}  {show_limit(config.rate_of(host))}  {ranks}{place}"
    yield "commands, each in the namespace named before it:"
    for command in commands(config, congestion):
        where = "switches" if command.host is None else host_name(command.host)
        yield f"  {where:9} {' '.join(command.argv)}"


def commands(config: LabConfig, congestion: str) -> list[Command]:
    """What `build` would run, the namespaces called by the hosts' names."""
    names = {host: f"NAMESPACE-OF-{host_name(host)}" for host in range(config.hosts)}
    return list(build(config, names, congestion))
