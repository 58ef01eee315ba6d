"""Timings that cannot be the machine's are refused before anything is fitted to them. A pure function, no torch."""

import math
from collections.abc import Iterator
from statistics import median

from thinwire.cluster.cluster import Cluster
from thinwire.errors import ProbeError
from thinwire.probe.effort import Shape
from thinwire.probe.fit import Samples, Timings
from thinwire.units import show_count, show_seconds

_LEAST_LAUNCHES = 20
"""Launches that an accelerator's largest product has to be worth: else launching is what was timed."""
_LEAST, _MOST = 0.05, 1.15
"""Of the maker's figures. A busy or throttled device falls short of them; nothing exceeds them but a clock that is wrong."""


def check(given: Cluster, timings: Timings) -> None:
    """Raise ProbeError if a time is none, the largest product is a launch, or a rate is far from the device's figures."""
    for what, samples in _all(timings):
        if not all(math.isfinite(second) and second > 0 for second in samples):
            raise ProbeError(f"{what} took {samples[0]} s: the clock cannot be trusted, and nothing was written")
    shape, product_s = largest_product(timings)
    launch_s, device = median(timings.launches), given.device
    if device.kind != "cpu" and product_s < _LEAST_LAUNCHES * launch_s:
        raise ProbeError(
            f"the largest product, {_shown(shape)}, took {show_seconds(product_s)}, and an operation on nothing "
            f"{show_seconds(launch_s)}: launching was timed, not the device; nothing was written. Probe without --quick"
        )
    size = max(timings.copies)
    _compare(f"the product {_shown(shape)}", flops(shape) / product_s, device.peak_flops_per_s, "FLOP/s", device.name)
    _compare(
        f"a copy of {size} bytes", size / median(timings.copies[size]), device.memory_bytes_per_s, "B/s", device.name
    )


def largest_product(timings: Timings) -> tuple[Shape, float]:
    """(shape, seconds in the median) of the product with most operations."""
    shape = max(timings.matmuls, key=flops)
    return shape, median(timings.matmuls[shape])


def flops(shape: Shape) -> float:
    """Operations of a product: 2 m k n."""
    return 2.0 * shape[0] * shape[1] * shape[2]


def _all(timings: Timings) -> Iterator[tuple[str, Samples]]:
    yield from ((f"the product {_shown(shape)}", samples) for shape, samples in timings.matmuls.items())
    yield from ((f"a copy of {size} bytes", samples) for size, samples in timings.copies.items())
    yield "an operation on eight numbers", timings.launches
    for kind, of_kind in (("an all-gather", timings.gathers), ("a reduce-scatter", timings.reduces)):
        yield from ((f"{kind} of {size} bytes", samples) for (_, size), samples in of_kind.items())


def _compare(what: str, rate: float, stated: float | None, unit: str, device: str) -> None:
    if stated is None or _LEAST * stated <= rate <= _MOST * stated:
        return
    cause = "something else uses it, or it is not that device" if rate < stated else "it is not that device"
    raise ProbeError(
        f"{what} ran at {show_count(rate)}{unit}, {100 * rate / stated:.3g} % of what {device} is stated to do "
        f"({show_count(stated)}{unit}): {cause}; nothing was written. `nvidia-smi` shows who uses it, --device names another"
    )


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape))
