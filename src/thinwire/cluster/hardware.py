"""Devices and clusters by name. Every figure stands beside its source; all of them are `default`, none is measured.

Rates are per direction. A node's uplink is what all its network adapters carry together.
"""

from collections.abc import Mapping

from thinwire.cluster.cluster import Calibration, Cluster, Device, Level
from thinwire.config import nearest
from thinwire.errors import ConfigError

_GIB = 2**30
_GBIT = 1e9 / 8


def _gpu(name: str, tflops: float, memory_bytes: float, terabytes_per_s: float) -> Device:
    """Peak is that of dense bf16 matmuls which add up in fp32."""
    return Device(
        name=name, kind="cuda", peak_flops_per_s=tflops * 1e12, memory_bytes=int(memory_bytes),
        memory_bytes_per_s=terabytes_per_s * 1e12, origin="default",
    )  # fmt: skip


_ALL = (
    # A CPU's peak differs by machine: it is measured when a run starts.
    Device(name="cpu", kind="cpu", origin="default"),
    # NVIDIA HGX B200 data sheet (2024): 4.5 PFLOP/s bf16 with sparsity, 180 GB HBM3e at 7.7 TB/s.
    _gpu("b200", 2250, 180e9, 7.7),
    # NVIDIA H200 data sheet (2023): 989 TFLOP/s bf16 dense, 141 GB HBM3e at 4.8 TB/s.
    _gpu("h200", 989, 141e9, 4.8),
    # NVIDIA H100 SXM data sheet (2022): 989 TFLOP/s bf16 dense, 80 GB HBM3 at 3.35 TB/s.
    _gpu("h100", 989, 80 * _GIB, 3.35),
    # NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOP/s bf16 dense, 80 GB HBM2e at 2,039 GB/s.
    _gpu("a100-80g", 312, 80 * _GIB, 2.039),
    # NVIDIA A100 40GB data sheet (2020): 312 TFLOP/s bf16 dense, 40 GB HBM2 at 1,555 GB/s.
    _gpu("a100-40g", 312, 40 * _GIB, 1.555),
    # NVIDIA L40S data sheet (2023): 362 TFLOP/s bf16 dense, 48 GB GDDR6 at 864 GB/s.
    _gpu("l40s", 362, 48e9, 0.864),
    # NVIDIA Ampere GA102 whitepaper (2021), RTX A6000: 154.8 TFLOP/s bf16 dense, 48 GB GDDR6 at 768 GB/s.
    _gpu("a6000", 154.8, 48 * _GIB, 0.768),
    # NVIDIA Ampere GA102 whitepaper (2020): 71 TFLOP/s bf16 dense with fp32 sums, 24 GB GDDR6X at 936 GB/s.
    _gpu("rtx-3090", 71, 24 * _GIB, 0.936),
    # NVIDIA Ada whitepaper (2022): 165.2 TFLOP/s bf16 dense with fp32 sums, 24 GB GDDR6X at 1,008 GB/s.
    _gpu("rtx-4090", 165.2, 24 * _GIB, 1.008),
    # NVIDIA RTX Blackwell whitepaper (2025): 209.5 TFLOP/s bf16 dense with fp32 sums, 32 GB GDDR7 at 1,792 GB/s.
    _gpu("rtx-5090", 209.5, 32 * _GIB, 1.792),
    # AMD Instinct MI300X data sheet (2023): 1,307.4 TFLOP/s bf16 dense, 192 GB HBM3 at 5.3 TB/s.
    _gpu("mi300x", 1307.4, 192 * _GIB, 5.3),
    # AMD MI250X data sheet (2021), one of its two dies (GCD): 191.5 TFLOP/s bf16, 64 GB HBM2e at 1.6 TB/s.
    _gpu("mi250x-gcd", 191.5, 64 * _GIB, 1.6),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}
PRODUCTS: Mapping[str, str] = {
    "NVIDIA B200": "b200",
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}
"""What NVIDIA's driver calls a device -> the preset with its figures. Others of a family (PCIe, NVL) have other figures."""


# Fitted on five bf16 runs of torchtitan (its benchmarks/llama3_h100_202412 page and async TP post): element-wise work,
# casts and copies of sharded parameters take much more of a step there than a count of their bytes says.
_H100 = Calibration(matmul_efficiency=0.56, memory_efficiency=0.2, source="five H100 runs of torchtitan, 2024")
CALIBRATIONS: Mapping[str, Calibration] = {
    "a100-80g": Calibration(),
    "a100-40g": Calibration(),
    "h100": _H100,
    "h200": _H100,
    # 22B at 38.4% of peak on one die's share (arXiv 2312.12705, abstract), element-wise work as on an A100.
    "mi250x-gcd": Calibration(matmul_efficiency=0.5, source="38.4% of peak, arXiv 2312.12705"),
}


def calibration_of(cluster: Cluster) -> Calibration:
    """What the cluster carries, else the default of its device, else that of an A100 with a source that says so."""
    if cluster.calibration is not None:
        return cluster.calibration
    known = CALIBRATIONS.get(cluster.device.name)
    return known or Calibration(source=f"A100 runs: nothing is known of device {cluster.device.name!r}")


def _level(name: str, fanout: int, bytes_per_s: float, latency_s: float) -> Level:
    return Level(name=name, fanout=fanout, bytes_per_s=bytes_per_s, latency_s=latency_s, origin="default")


CLUSTERS: Mapping[str, Cluster] = {
    # Two ranks on one machine; loopback has no rate worth stating.
    "laptop": Cluster(device=DEVICES["cpu"], levels=(Level(name="node", fanout=2, origin="default"),)),
    # DGX A100 data sheet: NVLink 3 gives each GPU 300 GB/s a direction; 8 x HDR 200 Gbit/s adapters a node.
    "dgx-a100-4": Cluster(
        device=DEVICES["a100-80g"],
        levels=(_level("node", 8, 300e9, 5e-6), _level("cluster", 4, 1600 * _GBIT, 10e-6)),
    ),
    # Eight H100 (NVLink 4: 450 GB/s a direction) in a node with one 25 Gbit/s Ethernet port; latency of TCP in a rack.
    "h100-25gbe-4": Cluster(
        device=DEVICES["h100"],
        levels=(_level("node", 8, 450e9, 5e-6), _level("cluster", 4, 25 * _GBIT, 50e-6)),
    ),
    # Meta's Llama 3 cluster (arXiv 2407.21783, section 3.3): 16,384 H100, 400 Gbit/s RoCE for each GPU, pods of 3,072.
    # Here a flat network of 2,048 nodes: the paper's 1:7 oversubscription applies between pods only.
    "h100-400g-2048": Cluster(
        device=DEVICES["h100"],
        levels=(_level("node", 8, 450e9, 5e-6), _level("cluster", 2048, 3200 * _GBIT, 10e-6)),
    ),
    # DGX A100 data sheet as above; 128 nodes are the 1,024 GPUs of arXiv 2104.04473, figure 11.
    "dgx-a100-128": Cluster(
        device=DEVICES["a100-80g"],
        levels=(_level("node", 8, 300e9, 5e-6), _level("cluster", 128, 1600 * _GBIT, 10e-6)),
    ),
    # Rented nodes of eight H100 with one 10 Gbit/s Ethernet port each; latency of TCP in a data centre.
    "h100-10gbe-16": Cluster(
        device=DEVICES["h100"],
        levels=(_level("node", 8, 450e9, 5e-6), _level("cluster", 16, 10 * _GBIT, 50e-6)),
    ),
    # Three sites joined by 1 Gbit/s of the public internet, 100 ms there and back (arXiv 2412.01152 reports runs over
    # such links); in a site four nodes of eight H100 with 200 Gbit/s each.
    "three-sites": Cluster(
        device=DEVICES["h100"],
        levels=(
            _level("node", 8, 450e9, 5e-6),
            _level("site", 4, 200 * _GBIT, 20e-6),
            _level("wan", 3, 1 * _GBIT, 50e-3),
        ),
    ),
    # Frontier user guide (OLCF): two dies of an MI250X joined by 200 GB/s, packages by 50-100 GB/s,
    # four 25 GB/s Slingshot adapters a node. 48 nodes: the size of the 384-die runs in arXiv 2501.04266.
    "frontier-48": Cluster(
        device=DEVICES["mi250x-gcd"],
        levels=(
            _level("pair", 2, 200e9, 5e-6),
            _level("node", 4, 100e9, 8e-6),
            _level("cluster", 48, 100e9, 15e-6),
        ),
    ),
}


def preset(name: str) -> Cluster:
    """The cluster called `name`. Raises ConfigError with the nearest name there is."""
    if name not in CLUSTERS:
        raise ConfigError(_unknown("cluster preset", name, list(CLUSTERS)))
    return CLUSTERS[name]


def device_preset(name: str) -> Device:
    """The device called `name`. Raises ConfigError with the nearest name there is."""
    if name not in DEVICES:
        raise ConfigError(_unknown("device", name, list(DEVICES)))
    return DEVICES[name]


def _unknown(what: str, name: str, known: list[str]) -> str:
    return f"there is no {what} {name!r}{nearest(name, known)}"
