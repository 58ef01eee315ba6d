"""From timings to the figures of a cluster file: the inverse of the cost formulas. Pure functions, no torch.

A matmul's rate is peak x efficiency x the product of d / (d + half) over its extents; a gather of V bytes over k members
takes (k - 1) latencies and V (k - 1) / k bytes over the rate. Both are fitted by least squares of relative errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np

from thinwire.cluster.calibration import Calibration
from thinwire.cluster.cluster import Cluster, Measurement

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Timings:
    """Seconds of every repetition, the slowest rank's each."""

    matmuls: Mapping[Shape, Sequence[float]]
    copies: Mapping[int, Sequence[float]]
    """Bytes read and written -> seconds."""
    launches: Sequence[float]
    gathers: Mapping[tuple[int, int], Sequence[float]]
    """(level index, bytes one rank sends) -> seconds of an all-gather."""
    reduces: Mapping[tuple[int, int], Sequence[float]]
    """The same of a reduce-scatter."""
    slowdowns: Sequence[float]
    """Compute beside a collective over compute alone, minus 1."""
    memory_bytes: int
    runtime_bytes: int


def summary(what: str, unit: str, values: Sequence[float]) -> Measurement:
    """Median and spread of repetitions."""
    middle = median(values)
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (middle, middle, middle)
    spread = (high - low) / 2 / abs(middle) if middle else 0.0
    return Measurement(what=what, value=middle, unit=unit, spread=round(spread, 4), samples=len(values))


def matmul_curve(rates: Mapping[Shape, float]) -> tuple[float, float, float]:
    """(peak, efficiency, half): peak is the best rate seen; the rest is the best of a grid of halves."""
    peak = max(rates.values())
    best = (float("inf"), 1.0, 0.0)
    for half in np.concatenate([[0.0], np.geomspace(0.25, 512, 200)]):
        shares = {s: float(np.prod([d / (d + half) for d in s])) for s in rates}
        ratios = np.array([rates[s] / peak / shares[s] for s in rates])
        inverse = 1 / ratios
        efficiency = min(1.0, float(inverse.sum() / (inverse**2).sum()))
        error = float(np.sum((efficiency * inverse - 1) ** 2))
        best = min(best, (error, efficiency, float(half)))
    return peak, best[1], best[2]


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """(seconds before the first byte, bytes per second) of sizes -> seconds."""
    sizes, seconds = np.array(list(points), dtype=float), np.array(list(points.values()))
    system = np.stack([1 / seconds, sizes / seconds], axis=1)
    start, slope = np.linalg.lstsq(system, np.ones(len(sizes)), rcond=None)[0]
    if start < 0:
        start, slope = 0.0, float((sizes / seconds).sum() / ((sizes / seconds) ** 2).sum())
    if slope <= 0:  # timings that do not grow with size: the largest message bounds the rate from below
        return float(start), float(sizes[-1] / seconds[-1])
    return float(start), float(1 / slope)


def measured_cluster(given: Cluster, timings: Timings) -> Cluster:
    """`given` with every figure that was measured, and the measurements themselves."""
    rates = {s: 2.0 * s[0] * s[1] * s[2] / median(t) for s, t in timings.matmuls.items()}
    peak, efficiency, half = matmul_curve(rates)
    largest = max(timings.copies)
    levels = []
    for index, level in enumerate(given.levels):
        if level.fanout == 1:
            levels.append(level)
            continue
        both = [
            {size: median(t) for (at, size), t in found.items() if at == index}
            for found in (timings.gathers, timings.reduces)
        ]
        start, rate = line({size: (both[0][size] + both[1][size]) / 2 for size in both[0]})
        figures = {"bytes_per_s": rate * given.ranks_within(index - 1), "latency_s": start / (level.fanout - 1)}
        levels.append(level.model_copy(update=figures | {"origin": "measured"}))
    device = given.device.model_copy(
        update={
            "peak_flops_per_s": peak,
            "memory_bytes": timings.memory_bytes,
            "memory_bytes_per_s": largest / median(timings.copies[largest]),
            "origin": "measured",
        }
    )
    calibration = Calibration(
        matmul_efficiency=efficiency,
        matmul_half=half,
        memory_efficiency=1.0,
        launch_s=median(timings.launches),
        inner_link_efficiency=1.0,
        outer_link_efficiency=1.0,
        overlap_slowdown=max(0.0, median(timings.slowdowns)) if timings.slowdowns else 0.0,
        framework_bytes=timings.runtime_bytes,
        origin="measured",
        source="thinwire probe",
    )
    return Cluster(
        device=device, levels=tuple(levels), calibration=calibration, measured=tuple(_measured(given, timings))
    )


def _measured(given: Cluster, timings: Timings) -> list[Measurement]:
    found = [summary(f"matmul {m} x {k} x {n}", "s", t) for (m, k, n), t in timings.matmuls.items()]
    found += [summary(f"copy, {size} bytes read and written", "s", t) for size, t in timings.copies.items()]
    found.append(summary("one small operation", "s", timings.launches))
    for kind, of_kind in (("all-gather", timings.gathers), ("reduce-scatter", timings.reduces)):
        found += [
            summary(f"{kind} over {given.levels[level].name}, {size} bytes sent by a rank", "s", t)
            for (level, size), t in of_kind.items()
        ]
    if timings.slowdowns:
        found.append(summary("slowdown of compute beside a collective", "share", timings.slowdowns))
    found.append(summary("memory of a rank", "B", [float(timings.memory_bytes)]))
    found.append(summary("memory of the runtime", "B", [float(timings.runtime_bytes)]))
    return found
