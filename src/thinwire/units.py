"""Sizes, rates and times: parsed from what people write, printed as people read them.

Inside thinwire every number is in bytes, seconds, bytes per second or FLOP per second, and its name says so.
Only the edges (TOML, command line, tables) use the functions and annotated types of this file.
Network rates follow their trade: bits, powers of ten. Memory follows its own: bytes, `KiB`..`TiB` powers of two.

What measures time or waits for it takes a `SystemClock`, so that a test can let hours pass.
"""

import math
import re
import time
from typing import Annotated

from pydantic import BeforeValidator

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LEAST = 1e-12
_PREFIX = {**_DECIMAL, **_BINARY}
_QUANTITY = re.compile(r"^\s*([-+]?[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?|[-+]?(?:nan|inf))\s*(\S*)\s*$")


def _split(text: str | float, example: str) -> tuple[float, str]:
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"{text} is not a quantity; write for example {example!r}")
    if isinstance(text, int | float):
        number, unit = _float(text), ""
    else:
        match = _QUANTITY.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a quantity; write for example {example!r}")
        number, unit = float(match[1]), match[2]
    if not math.isfinite(number) or number < 0:
        shown = text if isinstance(text, str) else f"{number:g}"
        raise ValueError(f"{shown!r} is not a finite, non-negative quantity; write for example {example!r}")
    return number, unit


def _float(number: float) -> float:
    """Infinity for an integer that is larger than any float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _times(number: float, factor: float, text: str | float) -> float:
    """Raises ValueError where the product is no float, or so small that what is divided by it is none."""
    product = number * factor
    if not math.isfinite(product) or 0 < product < _LEAST:
        raise ValueError(f"{text!r} is {'smaller' if product < 1 else 'larger'} than anything that can be meant")
    return product


def whole_number(text: str, *, most: int = 10**9) -> int | None:
    """The number that ASCII digits write, from 0 to `most`; None for anything else (`isdigit` takes `²` for one too)."""
    if not (text.isascii() and text.isdigit()) or len(text.lstrip("0")) > len(str(most)):
        return None
    number = int(text)
    return number if number <= most else None


def parse_bytes(text: str | float) -> int:
    """`"80 GiB"`, `"1.5 GB"`, `4096` -> bytes. Raises ValueError with an example."""
    number, unit = _split(text, "80 GiB")
    prefix = unit.removesuffix("B")
    if unit and (not unit.endswith("B") or prefix not in _PREFIX):
        raise ValueError(f"{text!r} has no unit of size (B, KB, MiB, GiB, ...); write for example '80 GiB'")
    return round(_times(number, _PREFIX[prefix], text))


def parse_rate(text: str | float) -> float:
    """`"100 Gbit/s"`, `"25 GB/s"`, plain numbers as bytes per second -> bytes per second. Raises ValueError."""
    number, unit = _split(text, "100 Gbit/s")
    if not unit:
        return _times(number, 1.0, text)
    for suffix, scale in (("bit/s", 1 / 8), ("b/s", 1 / 8), ("bps", 1 / 8), ("B/s", 1.0)):
        prefix = unit.removesuffix(suffix)
        if prefix != unit and prefix in _PREFIX:
            return _times(number, _PREFIX[prefix] * scale, text)
    raise ValueError(f"{text!r} has no unit of rate (Mbit/s, Gbit/s, GB/s, ...); write for example '100 Gbit/s'")


def parse_seconds(text: str | float) -> float:
    """`"2 us"`, `"30 ms"`, `"1.5 h"`, plain numbers as seconds -> seconds. Raises ValueError."""
    number, unit = _split(text, "30 ms")
    if unit and unit not in _SECONDS:
        raise ValueError(f"{text!r} has no unit of time (us, ms, s, min, h, d); write for example '30 ms'")
    return _times(number, _SECONDS[unit or "s"], text)


def parse_flops(text: str | float) -> float:
    """`"312 TFLOP/s"`, plain numbers as FLOP per second -> FLOP per second. Raises ValueError."""
    number, unit = _split(text, "312 TFLOP/s")
    prefix = unit.removesuffix("/s").removesuffix("FLOPS").removesuffix("FLOP")
    if unit and (prefix == unit or prefix not in _DECIMAL):
        raise ValueError(f"{text!r} has no unit of compute (GFLOP/s, TFLOP/s, ...); write for example '312 TFLOP/s'")
    return _times(number, _DECIMAL[prefix], text)


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
BytesPerS = Annotated[float, BeforeValidator(parse_rate)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
FlopsPerS = Annotated[float, BeforeValidator(parse_flops)]


def _scaled(value: float, prefixes: dict[str, float], unit: str) -> str:
    """Three significant digits with the largest prefix that leaves at least 1 before the point (else the smallest)."""
    smallest = min(prefixes.values())
    for prefix, factor in sorted(prefixes.items(), key=lambda item: -item[1]):
        if abs(value) >= factor or factor == smallest:
            scaled = value / factor
            digits = 0 if scaled >= 100 or scaled == int(scaled) else 1 if scaled >= 10 else 2
            return f"{scaled:.{digits}f} {prefix}{unit}"
    raise AssertionError("prefixes is empty")


def show_bytes(value: float) -> str:
    """Bytes -> `"1.50 GiB"`."""
    return _scaled(value, {"": 1.0, **_BINARY}, "B")


def show_rate(value: float) -> str:
    """Bytes per second -> `"100 Gbit/s"`."""
    return _scaled(value * 8, {k: v for k, v in _DECIMAL.items() if k != "K"}, "bit/s")


def show_count(value: float) -> str:
    """A count -> `"1.24 M"`, `"70.6 G"`."""
    return _scaled(value, {k: v for k, v in _DECIMAL.items() if k != "K"}, "").rstrip()


def show_seconds(value: float) -> str:
    """Seconds -> `"13 ms"`, `"2.50 s"`, `"1 h 05 min"`."""
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
    if value >= 60:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return _scaled(value, {"": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}, "s") if value > 0 else "0 s"


class SystemClock:
    """The machine's time."""

    def now(self) -> float:
        """Seconds since some moment; they never go back."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


SYSTEM_CLOCK = SystemClock()
"""Without state: the default of whatever takes a clock."""
