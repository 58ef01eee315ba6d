"""Devices and clusters by name, and the accelerators that this machine shows. No torch.

Every figure of a preset stands beside its source; all of them are `default`, none is measured. Rates are per direction. A
node's uplink is what all its network adapters carry together.

What a machine has is read from what drivers leave in the file system. NVIDIA's makes `/dev/nvidiaN` for each GPU that a
process (in a container: of those given to it) may open, and tells its model under `/proc/driver/nvidia/gpus`; where it does
not, nvidia-smi is asked. AMD's lists its processors under `/sys/class/kfd`. What the environment hides
(CUDA_VISIBLE_DEVICES and AMD's likes) does not count.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

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


_SMI_S = 20.0
_HIDES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def found_gpus(environment: Mapping[str, str], root: Path = Path("/")) -> tuple[str, ...]:
    """Names of the GPUs that a process of this environment may use, in the driver's order."""
    names = _nvidia(root) or _amd(root)
    for variable in _HIDES:
        if variable in environment:
            names = _shown(names, environment[variable])
    return tuple(names)


def found_device(names: Sequence[str]) -> Device:
    """What a rank computes on if nobody says: such a GPU, with its preset's figures if it has one; without any a CPU."""
    if not names:
        return device_preset("cpu")
    if preset := PRODUCTS.get(names[0]):
        return device_preset(preset)
    return Device(name=names[0], kind="cuda", origin="default")


def check_ranks(cluster: Cluster, ranks: int, names: Sequence[str]) -> None:
    """Raise ConfigError if `ranks` ranks of this machine would have to share the GPUs seen on it without being told to."""
    if cluster.device.kind == "cuda" and names and ranks > len(names) and not cluster.share_device:
        raise ConfigError(
            f"{ranks} ranks of this machine are more than its {_count(len(names))} ({names[0]}); make cluster.levels fit, "
            f"set cluster.device = 'cpu', or, to test several ranks on one card, cluster.share_device = true"
        )


def described(cluster: Cluster, names: Sequence[str]) -> str:
    """One line about what the ranks compute on: `device: NVIDIA H200 x1`; `names`: the GPUs seen on this machine."""
    device, ranks = cluster.device, cluster.ranks
    if device.kind == "cpu":
        seen = f" ({_count(len(names))} seen; set cluster.device)" if names else ""
        return f"device: {device.name}{seen}"
    if not names:
        return f"device: {device.name} x{ranks} (none is seen from here)"
    what = names[0]
    given = device.name not in (what, PRODUCTS.get(what), "cuda")
    planned = f" (the run file says {device.name})" if given else ""
    if cluster.share_device:
        return f"device: {what} x{min(ranks, len(names))} for {ranks} ranks, which talk over host memory{planned}"
    return f"device: {what} x{ranks}{planned}"


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def _nvidia(root: Path) -> list[str]:
    minors = sorted(int(path.name[6:]) for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    models: dict[int, str] = {}
    for path in (root / "proc/driver/nvidia/gpus").glob("*/information"):
        reported = dict(re.findall(r"^([\w ]+):\s*(.+?)\s*$", _text(path), re.MULTILINE))
        if reported.get("Device Minor", "").isdigit():
            models[int(reported["Device Minor"])] = reported.get("Model", "NVIDIA GPU")
    names = [models[minor] for minor in minors if minor in models]
    return names if len(names) == len(minors) > 0 else _asked(root) or ["NVIDIA GPU"] * len(minors)


def _asked(root: Path) -> list[str]:
    """What nvidia-smi says: where the driver is not this kernel's own (WSL, sandboxes) nothing else does."""
    program = shutil.which("nvidia-smi") if root == Path("/") else None
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _amd(root: Path) -> list[str]:
    if not (root / "dev/kfd").exists():
        return []
    names = []
    for path in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"), key=_number):
        reported = {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", _text(path), re.MULTILINE)}
        if reported.get("simd_count"):
            names.append(f"AMD {_gfx(reported.get('gfx_target_version', 0))}")
    return names


def _gfx(version: int) -> str:
    """90402 -> gfx942, the architecture: several products share it, with different figures, so it means no preset."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _number(path: Path) -> int:
    return int(path.parent.name) if path.parent.name.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _shown(names: list[str], value: str) -> list[str]:
    """As CUDA reads it: numbers or identifiers up to the first that is none of a GPU that is there."""
    shown: list[str] = []
    for word in value.replace(" ", "").split(","):
        if word.isdigit() and int(word) < len(names):
            shown.append(names[int(word)])
        elif re.match(r"(GPU|MIG)-", word) and names:
            shown.append(names[0])
        else:
            break
    return shown
