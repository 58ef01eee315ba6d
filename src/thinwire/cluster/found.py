"""Which accelerators this machine shows, read from what their drivers leave in the file system. No torch.

NVIDIA's driver makes `/dev/nvidiaN` for each GPU that a process (in a container: of those given to it) may open, and tells
its model under `/proc/driver/nvidia/gpus`; where it does not, nvidia-smi is asked. AMD's lists its processors under
`/sys/class/kfd`. What the environment hides (CUDA_VISIBLE_DEVICES and AMD's likes) does not count.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from thinwire.cluster.cluster import Cluster, Device
from thinwire.cluster.hardware import PRODUCTS, device_preset
from thinwire.errors import ConfigError

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
        told = dict(re.findall(r"^([\w ]+):\s*(.+?)\s*$", _text(path), re.MULTILINE))
        if told.get("Device Minor", "").isdigit():
            models[int(told["Device Minor"])] = told.get("Model", "NVIDIA GPU")
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
        told = {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", _text(path), re.MULTILINE)}
        if told.get("simd_count"):
            names.append(f"AMD {_gfx(told.get('gfx_target_version', 0))}")
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
