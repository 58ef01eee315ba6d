"""Seconds of matmuls and of element-wise work on one device: a roofline with an efficiency curve, over a launch floor."""

from thinwire.cluster.calibration import Calibration
from thinwire.cluster.cluster import Device
from thinwire.cost.candidate import Setting
from thinwire.errors import ConfigError


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
