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
_BURST_S, _QUEUE_S = 0.004, 0.1


def burst_bytes(bytes_per_s: float, given: int | None = None) -> int:
    """Size of the bucket: 4 ms of the rate, but at least one large segment, lest the kernel cuts it up."""
    return given or max(round(SEGMENT_BYTES * _HEADERS) + 1514, round(bytes_per_s * _BURST_S))


def queue_bytes(bytes_per_s: float, burst: int) -> int:
    """What may wait for the link: 100 ms of it, and at least some segments; more is dropped, as a switch does."""
    return burst + max(8 * SEGMENT_BYTES, round(bytes_per_s * _QUEUE_S))


def limit(interface: str, bytes_per_s: float | None, burst: int | None = None) -> tuple[str, ...]:
    """The command that gives an interface a rate, or takes it away (None). What waits in a changed limiter stays."""
    replace = ("tc", "qdisc", "replace", "dev", interface, "root")
    if bytes_per_s is None:
        return (*replace, "noqueue")
    bucket = burst_bytes(bytes_per_s, burst)
    rate = f"{round(bytes_per_s * 8)}bit"
    waiting = str(queue_bytes(bytes_per_s, bucket))
    return (*replace, "handle", "1:", "tbf", "rate", rate, "burst", str(bucket), "limit", waiting)


def delay(interface: str, seconds: float, *, under_limit: bool) -> tuple[str, ...]:
    """The command that delays what leaves an interface, inside its limiter if it has one."""
    parent = ("parent", "1:1") if under_limit else ("root",)
    return ("tc", "qdisc", "add", "dev", interface, *parent, "netem", "delay", f"{round(seconds * 1e6)}us")


def show_limit(bytes_per_s: float | None) -> str:
    """`"100 Mbit/s"` or `"unlimited"`."""
    return "unlimited" if bytes_per_s is None else show_rate(bytes_per_s)
