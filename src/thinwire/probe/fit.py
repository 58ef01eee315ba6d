"""From timings to the figures of a cluster file: the inverse of the cost formulas. Pure functions, no torch.

A matmul's rate is peak x efficiency x the product of d / (d + half) over its extents; a gather of V bytes over k members
takes (k - 1) latencies and V (k - 1) / k bytes over the rate; what a block of a model takes beyond its matmuls is a rate
of its elements, forward and backward, a time for each operation and one for each weight. All are fitted by least squares
of relative errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median, quantiles

import numpy as np
from numpy.typing import NDArray

from thinwire.cluster.cluster import Calibration, Cluster, Level, Measurement
from thinwire.model.spec import KERNELS, causal_core_flops, kept_inside, kept_outside, linear_shapes, linear_weights
from thinwire.probe.effort import BlockShape, Shape

Samples = Sequence[float]
Matrix = NDArray[np.float64]
_FP32_BYTES = 4


@dataclass(frozen=True)
class Timings:
    """Seconds of every repetition, the slowest rank's each."""

    matmuls: Mapping[Shape, Samples]
    copies: Mapping[int, Samples]
    """Bytes read and written -> seconds."""
    launches: Samples
    gathers: Mapping[tuple[int, int], Samples]
    """(level index, bytes one rank sends) -> seconds of an all-gather."""
    reduces: Mapping[tuple[int, int], Samples]
    """The same of a reduce-scatter."""
    slowdowns: Samples
    """Compute beside a collective over compute alone, minus 1."""
    memory_bytes: int
    runtime_bytes: int
    blocks: Mapping[BlockShape, tuple[Samples, Samples]] = field(default_factory=dict)
    """Seconds of a forward, and of a forward and a backward."""
    logit: Samples = ()
    """Seconds of the loss of one logit, forward and backward."""
    update: Samples = ()
    """Seconds of updating one number."""
    collect: Samples = ()
    """Seconds of taking one number of a gradient over."""
    coding: Mapping[str, tuple[Samples, Samples]] = field(default_factory=dict)
    """Codec -> seconds of coding one number, of decoding one."""
    behind: Mapping[int, Samples] = field(default_factory=dict)
    """Level index -> share of a gather that goes on while ranks compute."""
    exchanges: Mapping[tuple[int, int, int], Samples] = field(default_factory=dict)
    """(level index, one member, another) -> seconds in which they exchange a chunk, all others silent."""
    sync_points: Samples = ()
    """Seconds lost whenever ranks of one host wait for each other between stretches of compute."""


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


def sustained(points: Mapping[int, float]) -> float:
    """Bytes per second of a link that is kept busy, from the two largest of sizes -> seconds.

    Buffers on the way swallow the first bytes of a message that comes alone; those of a step follow one another.
    """
    (small, small_s), (large, large_s) = sorted(points.items())[-2:] if len(points) > 1 else [(0, 0.0), *points.items()]
    return (large - small) / (large_s - small_s) if large_s > small_s else large / large_s


@dataclass(frozen=True)
class Beyond:
    """What blocks of a model show of a device."""

    matmuls: float
    """Seconds of their matmuls over what the curve says."""
    bytes_per_s: float
    """Of element-wise work in a forward."""
    backward: float
    """Such work of a backward over that of its forward, for the same elements."""
    operation_s: float
    weight_s: float
    """Of each weight in a forward, however few tokens there are."""


def blocks_show(
    blocks: Mapping[BlockShape, tuple[float, float]], curve: tuple[float, float, float], *, most_bytes_per_s: float
) -> Beyond:
    """The figures that seconds of (forward, forward and backward) show."""
    rows, seconds = [], []
    for shape, (forward_s, whole_s) in blocks.items():
        multiplying, touched = _counted(shape, curve)
        weights = linear_weights(shape.spec)
        rows.append((multiplying, touched, 0.0, KERNELS, weights))
        rows.append((2 * multiplying, 0.0, touched, 2 * KERNELS, 2 * weights))
        seconds += [forward_s, max(1e-9, whole_s - forward_s)]
    relative = np.array(rows) / np.array(seconds)[:, None]
    matmuls, forward, backward, operation_s, weight_s = non_negative(relative, np.ones(len(rows)))
    least = 1 / most_bytes_per_s
    forward, backward = max(forward, least), max(backward, least)
    return Beyond(matmuls or 1.0, 1 / forward, backward / forward, operation_s, weight_s)


def non_negative(system: Matrix, wanted: Matrix) -> list[float]:
    """Least squares with no unknown below 0: the best of all choices of which unknowns are 0. For few unknowns."""
    count = system.shape[1]
    best: tuple[float, list[float]] = (float("inf"), [0.0] * count)
    for chosen in product((False, True), repeat=count):
        columns = [i for i in range(count) if chosen[i]]
        found = np.zeros(count)
        if columns:
            found[columns] = np.linalg.lstsq(system[:, columns], wanted, rcond=None)[0]
        if (found >= 0).all():
            best = min(best, (float(np.sum((system @ found - wanted) ** 2)), found.tolist()))
    return best[1]


def _counted(shape: BlockShape, curve: tuple[float, float, float]) -> tuple[float, float]:
    """(seconds of a forward's matmuls by the curve, bytes that its element-wise work touches)."""
    peak, efficiency, half = curve
    spec, tokens = shape.spec, shape.sequences * shape.tokens
    share = efficiency * tokens / (tokens + half)
    multiplying = sum(
        2.0 * tokens * out * into / (peak * share * out / (out + half) * into / (into + half))
        for out, into in linear_shapes(spec)
    )
    core = causal_core_flops(spec, shape.sequences, shape.tokens, shape.tokens)
    multiplying += core / (peak * efficiency * spec.head_size / (spec.head_size + half))
    return multiplying, 2.0 * tokens * _FP32_BYTES * (kept_outside(spec) + kept_inside(spec))


def measured_cluster(given: Cluster, timings: Timings) -> Cluster:
    """`given` with every figure that was measured, and the measurements themselves."""
    rates = {s: 2.0 * s[0] * s[1] * s[2] / median(t) for s, t in timings.matmuls.items()}
    curve = matmul_curve(rates)
    largest = max(timings.copies)
    copied = largest / median(timings.copies[largest])
    beyond = Beyond(1.0, copied, 2.0, median(timings.launches), 0.0)
    if timings.blocks and given.device.kind == "cpu":  # elsewhere operations are queued ahead of the work
        medians = {shape: (median(once), median(whole)) for shape, (once, whole) in timings.blocks.items()}
        beyond = blocks_show(medians, curve, most_bytes_per_s=100 * copied)
    memory = max(copied, beyond.bytes_per_s)
    reached = curve[1] / beyond.matmuls
    # No repetition of any product, the largest one's among them, may lie above the peak.
    fastest = max(2.0 * s[0] * s[1] * s[2] / min(t) for s, t in timings.matmuls.items())
    peak = max(fastest, curve[0] * reached)
    device = given.device.model_copy(
        update={
            "peak_flops_per_s": peak,
            "memory_bytes": timings.memory_bytes,
            "memory_bytes_per_s": memory,
            "origin": "measured",
        }
    )
    calibration = Calibration(
        matmul_efficiency=min(1.0, curve[0] * reached / peak),
        matmul_half=curve[2],
        memory_efficiency=beyond.bytes_per_s / memory,
        memory_backward=beyond.backward,
        launch_s=beyond.operation_s,
        weight_s=beyond.weight_s,
        inner_link_efficiency=1.0,
        outer_link_efficiency=1.0,
        overlap_slowdown=max(0.0, median(timings.slowdowns)) if timings.slowdowns else 0.0,
        logit_s=median(timings.logit) if timings.logit else None,
        optimizer_s=median(timings.update) if timings.update else None,
        collect_s=median(timings.collect) if timings.collect else 0.0,
        sum_s=_sum_s(given, timings),
        meeting_s=max(0.0, median(timings.sync_points)) if timings.sync_points else 0.0,
        coding_s={name: (median(one), median(other)) for name, (one, other) in timings.coding.items()},
        framework_bytes=timings.runtime_bytes,
        origin="measured",
        source="thinwire probe",
    )
    levels = tuple(_level(given, timings, index) for index in range(len(given.levels)))
    return Cluster(device=device, levels=levels, calibration=calibration, measured=tuple(_measured(given, timings)))


def _level(given: Cluster, timings: Timings, index: int) -> Level:
    level = given.levels[index]
    if level.fanout == 1:
        return level
    points = {size: median(t) for (at, size), t in timings.gathers.items() if at == index}
    start, rate = line(points)
    if index in timings.behind and median(timings.behind[index]) > 0:
        rate = sustained(points)
    figures: dict[str, object] = {
        "bytes_per_s": rate * given.ranks_within(index - 1),
        "latency_s": start / (level.fanout - 1),
        "origin": "measured",
    }
    if index in timings.behind:
        figures["behind"] = round(median(timings.behind[index]), 3)
    return level.model_copy(update=figures)


def _sum_s(given: Cluster, timings: Timings) -> float:
    """By how much a reduce-scatter's largest message takes longer than a gather's where links are fastest, for a number."""
    if not timings.gathers:
        return 0.0
    inner = min(level for level, _ in timings.gathers)
    sent = max(size for level, size in timings.gathers if level == inner)
    fanout = given.levels[inner].fanout
    longer_s = median(timings.reduces[inner, sent]) - median(timings.gathers[inner, sent])
    return max(0.0, longer_s) / (sent / (fanout - 1) * fanout / _FP32_BYTES)


def _measured(given: Cluster, timings: Timings) -> list[Measurement]:
    found = [summary(f"matmul {m} x {k} x {n}", "s", t) for (m, k, n), t in timings.matmuls.items()]
    found += [summary(f"copy, {size} bytes read and written", "s", t) for size, t in timings.copies.items()]
    for shape, (once, whole) in timings.blocks.items():
        found += [summary(f"forward of {shape}", "s", once), summary(f"forward and backward of {shape}", "s", whole)]
    for name, (coding, decoding) in timings.coding.items():
        found += [summary(f"{name}: coding a number", "s", coding), summary(f"{name}: decoding one", "s", decoding)]
    single = {
        "one small operation": timings.launches,
        "the loss of a logit, forward and backward": timings.logit,
        "updating a number": timings.update,
        "taking a number of a gradient over": timings.collect,
        "waiting for each other between stretches of compute": timings.sync_points,
    }
    found += [summary(what, "s", t) for what, t in single.items() if t]
    for kind, of_kind in (("all-gather", timings.gathers), ("reduce-scatter", timings.reduces)):
        found += [
            summary(f"{kind} over {given.levels[level].name}, {size} bytes sent by a rank", "s", t)
            for (level, size), t in of_kind.items()
        ]
    for (level, one, other), t in timings.exchanges.items():
        found.append(summary(f"exchange between members {one} and {other} of {given.levels[level].name}", "s", t))
    for level, shares in timings.behind.items():
        found.append(summary(f"share of a gather over {given.levels[level].name} behind compute", "share", shares))
    if timings.slowdowns:
        found.append(summary("slowdown of compute beside a collective", "share", timings.slowdowns))
    found.append(summary("memory of a rank", "B", [float(timings.memory_bytes)]))
    found.append(summary("memory of the runtime", "B", [float(timings.runtime_bytes)]))
    return found
