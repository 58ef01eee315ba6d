"""What `tc` is told about one end of a link: a token bucket (tbf) for its rate, netem for its delay. Pure functions.

Two ends make a direction: the sender's own interface, and the port of the switch that leads to the receiver.
The limiter counts the headers of every segment (66 bytes of TCP, IP and Ethernet per 1,448), the interfaces' own
counters see the large segments before they are cut, and so few headers.
"""

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
