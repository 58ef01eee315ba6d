"""Which part of an axis lies on which level, what share of that level's link a rank gets, and what its device gives.

An axis of size n and stride s (ranks) covers the ranks s .. s n of a counting from inner to outer; what of that falls
between a level's inner and outer size is its part at that level. A link belongs to a member and is shared by all ranks
in it: collectives go level by level, so that every rank of a member sends its own shard at the same time. That is the
sharing of a node's link by concurrent groups: with tensor parallelism inside a node, as many rings as ranks.

Matmuls and element-wise work on one device follow a roofline with an efficiency curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinwire.cluster.cluster import Calibration, Cluster, Device
from thinwire.errors import ConfigError, PlanError
from thinwire.plan.hops import Buffer, Link, bucket_bytes
from thinwire.predict.candidate import Candidate, Setting


@dataclass(frozen=True)
class Hop:
    """The part of an axis at one level."""

    level: int
    fanout: int
    bytes_per_s: float
    """What one rank can send when all ranks of its member send."""
    latency_s: float
    alone: float
    """How many times that it can send when only its own stage of the member sends (point to point)."""
    start_s: float = 0.0
    """What starting a collective takes."""
    behind: float = 1.0
    """Share of a transfer that goes on while the rank computes."""


@dataclass(frozen=True)
class Axes:
    """Hops of each axis, inner to outer."""

    tensor: tuple[Hop, ...]
    context: tuple[Hop, ...]
    data: tuple[Hop, ...]
    pipeline: tuple[Hop, ...]
    groups: tuple[Hop, ...]
    states: tuple[Hop, ...] = ()
    """Context and data together: ranks that hold the same parameters, over which states are sharded and gradients summed."""


def place(candidate: Candidate, cluster: Cluster, calibration: Calibration) -> Axes:
    """Lay the axes out. Raises PlanError if an axis does not divide a level, ConfigError if a level has no figures."""
    data = candidate.data(cluster)
    middle = [("data", data), ("pipeline", candidate.pipeline)]
    order = [("tensor", candidate.tensor), ("context", candidate.context)]
    order += middle if candidate.pipeline_outside else middle[::-1]
    order += [("groups", candidate.groups(cluster))]
    hops: dict[str, tuple[Hop, ...]] = {}
    stride = 1
    for name, size in order:
        hops[name] = axis_hops(name, size, stride, cluster, calibration)
        stride *= size
    return Axes(**hops, states=_merged(hops["context"], hops["data"]))


def _merged(inner: tuple[Hop, ...], outer: tuple[Hop, ...]) -> tuple[Hop, ...]:
    """Two axes as one; parts at the same level become one hop."""
    hops = {hop.level: hop for hop in inner}
    for hop in outer:
        known = hops.get(hop.level)
        fanout = hop.fanout * (known.fanout if known else 1)
        hops[hop.level] = replace(hop, fanout=fanout)
    return tuple(hops[level] for level in sorted(hops))


def axis_hops(name: str, size: int, stride: int, cluster: Cluster, calibration: Calibration) -> tuple[Hop, ...]:
    """The parts of one axis. Raises PlanError, ConfigError."""
    hops, inner = [], 1
    for index, level in enumerate(cluster.levels):
        outer = inner * level.fanout
        low, high = max(stride, inner), min(stride * size, outer)
        if high > low:
            if high % low:
                raise PlanError(
                    f"{name} = {size} does not divide level {level.name!r}: a part of it would hold {low} to {high} of "
                    f"{outer} ranks"
                )
            inside = max(1, inner // stride)
            hops.append(_hop(index, high // low, inside, cluster, calibration))
        inner = outer
    return tuple(hops)


def _hop(index: int, fanout: int, inside: int, cluster: Cluster, calibration: Calibration) -> Hop:
    level = cluster.levels[index]
    rate = rate_of(cluster, index, calibration)
    return Hop(
        index,
        fanout,
        rate / cluster.ranks_within(index - 1),
        level.latency_s or 0.0,
        float(inside),
        calibration.collective_s,
        level.behind,
    )


def rate_of(cluster: Cluster, index: int, calibration: Calibration) -> float:
    """Bytes per second that one member of level `index` really sends. Raises ConfigError if the level has no figure."""
    level = cluster.levels[index]
    if level.bytes_per_s is None:
        raise ConfigError(
            f"level {level.name!r} has no bytes_per_s, which planning needs; give it, for example "
            f"bytes_per_s = '25 Gbit/s', or use a cluster preset"
        )
    share = calibration.inner_link_efficiency if index == 0 else calibration.outer_link_efficiency
    return level.bytes_per_s * share


def check_device(device: Device) -> None:
    """Raise ConfigError if the device lacks a figure that planning needs."""
    for name, example in (
        ("peak_flops_per_s", "312 TFLOP/s"),
        ("memory_bytes", "80 GiB"),
        ("memory_bytes_per_s", "2 TB/s"),
    ):
        if getattr(device, name) is None:
            raise ConfigError(
                f"device {device.name!r} has no {name}, which planning needs; give it in [cluster.device], for example "
                f"{name} = '{example}', or name a device that `thinwire presets` lists"
            )


def efficiency(m: float, n: float, k: float, calibration: Calibration) -> float:
    """Share of peak that an m x k by k x n matmul reaches: small extents leave tiles and pipelines unfilled."""
    half = calibration.matmul_half
    return calibration.matmul_efficiency * (m / (m + half)) * (n / (n + half)) * (k / (k + half))


def matmul_s(m: float, n: float, k: float, setting: Setting, *, batch: float = 1.0) -> float:
    """Seconds of `batch` matmuls of m x k by k x n: compute at its efficiency, or memory, whichever is slower.

    A CPU's caches hold what its matmuls read, so that the efficiency curve alone counts there.
    """
    device, calibration = setting.cluster.device, setting.calibration
    assert device.peak_flops_per_s and device.memory_bytes_per_s
    compute = 2.0 * m * n * k / (device.peak_flops_per_s * efficiency(m, n, k, calibration))
    if device.kind == "cpu":
        return batch * compute
    touched = setting.compute_bytes * (m * k + k * n + m * n)
    memory = touched / (device.memory_bytes_per_s * calibration.memory_efficiency)
    return batch * max(compute, memory)


def touch_s(touched_bytes: float, setting: Setting) -> float:
    """Seconds to read and write `touched_bytes` of device memory in element-wise work."""
    device = setting.cluster.device
    assert device.memory_bytes_per_s
    return touched_bytes / (device.memory_bytes_per_s * setting.calibration.memory_efficiency)


def hop_depths(candidate: Candidate, hops: Sequence[Hop]) -> tuple[int, int, int]:
    """(lp, lg, lo) counted in hops of the data axis."""
    lp, lg, lo = (sum(1 for hop in hops if hop.level <= depth) - 1 for depth in candidate.depths)
    return lp, lg, lo


def shard_counts(candidate: Candidate, hops: tuple[Hop, ...]) -> tuple[int, int, int]:
    """How many shards parameters, gradients and optimizer states have."""
    cumulative = [1]
    for hop in hops:
        cumulative.append(cumulative[-1] * hop.fanout)
    lp, lg, lo = hop_depths(candidate, hops)
    return cumulative[lp + 1], cumulative[lg + 1], cumulative[lo + 1]


def links_of(setting: Setting, hops: Sequence[Hop]) -> tuple[Link, ...]:
    """The links of the states axis. On CPUs gathers over sockets carry tags, over NCCL and inside a host none."""
    levels, cpu = setting.cluster.levels, setting.cluster.device.kind == "cpu"
    return tuple(
        Link(
            hop.level,
            hop.fanout,
            header_bytes=8 * (hop.fanout - 1) if cpu and hop.behind > 0 else 0,
            tagged=cpu,
            latency_s=levels[hop.level].latency_s,
            bytes_per_s=levels[hop.level].bytes_per_s,
        )
        for hop in hops
    )


def buffer_of(
    elements: float, setting: Setting, candidate: Candidate, hops: Sequence[Hop], *, parameters: int = 0
) -> Buffer:
    """A flat buffer of so many elements. Raises PlanError for gradients of low rank."""
    lp, lg, lo = hop_depths(candidate, hops)
    multiple = math.prod(hop.fanout for hop in hops) * (candidate.coding.block if _compressed(candidate) else 1)
    return Buffer(
        -(-round(elements) // multiple) * multiple,
        lp,
        lg,
        lo,
        tuple(codec_at(candidate.weights, hop.level) for hop in hops),
        tuple(codec_at(candidate.grads, hop.level) for hop in hops),
        weight_bytes=setting.compute_bytes,
        grad_bytes=round(setting.framework.grad_wire_bytes),
        block=candidate.coding.block,
        parameters=parameters,
        used=round(elements),
    )


def codec_at(codecs: Sequence[str | None], level: int) -> str | None:
    """The codec that a level has, if any. Raises PlanError for gradients of low rank."""
    found = codecs[level] if level < len(codecs) else None
    if found == "lowrank":
        raise PlanError(
            "gradients of low rank are not planned: what they send and cost depends on every matrix's shape"
        )
    return found


def _compressed(candidate: Candidate) -> bool:
    return any(codec not in (None, "fp32", "bf16", "fp16") for codec in (*candidate.weights, *candidate.grads))


def bucket_of(setting: Setting, candidate: Candidate, hops: Sequence[Hop]) -> int:
    """Size in bytes up to which units travel together. Of a pipeline's stages none do."""
    if not setting.framework.buckets or candidate.pipeline > 1:
        return 0
    if candidate.bucket_bytes is not None:
        return candidate.bucket_bytes
    total = round(setting.parameters / candidate.tensor) * round(setting.framework.grad_wire_bytes)
    return bucket_bytes(total, links_of(setting, hops))


def blocks_together(setting: Setting, candidate: Candidate, hops: Sequence[Hop]) -> int:
    """How many blocks travel together."""
    each = round(setting.block_parameters / candidate.tensor * setting.framework.grad_wire_bytes)
    return max(1, min(setting.spec.layers, bucket_of(setting, candidate, hops) // each))
