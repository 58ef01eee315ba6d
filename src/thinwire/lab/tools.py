"""What this machine must have for a lab, and the sentence for each thing that is missing."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from thinwire.errors import LabError

_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "mount": "util-linux"}
_ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_SYS_ADMIN, _NET_ADMIN = 1 << 21, 1 << 12
_SETTINGS = {
    "kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=10000"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
}


def search_path(path: str) -> str:
    """PATH with the administrators' folders, where Debian keeps `ip` and `tc`."""
    return f"{path}:{_ADMIN_PATH}"


def check_machine(environment: Mapping[str, str]) -> None:
    """Raise LabError on another system than Linux, or if a program is missing."""
    if sys.platform != "linux":
        raise LabError("the lab needs Linux (network namespaces and tc); use a Linux machine or a virtual one")
    path = search_path(environment.get("PATH", ""))
    missing = [program for program in _PACKAGES if shutil.which(program, path=path) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES[program] for program in missing}))
        raise LabError(f"the lab needs {' and '.join(missing)}; install them, on Debian: apt-get install {packages}")


def may_administrate(status: str) -> bool:
    """Whether the process whose /proc/PID/status this is may make namespaces and interfaces without a user namespace."""
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16) & (_SYS_ADMIN | _NET_ADMIN) == _SYS_ADMIN | _NET_ADMIN


def why_no_namespaces(said: str, *, rootless: bool, proc_sys: Path = Path("/proc/sys")) -> str:
    """The sentence for namespaces that could not be made; `said` is what `unshare` or `ip` said."""
    if rootless:
        for key, (bad, remedy) in _SETTINGS.items():
            setting = proc_sys / key
            if setting.exists() and setting.read_text(encoding="ascii").strip() == bad:
                return (
                    f"this kernel gives user namespaces to root only ({key.replace('/', '.')} = {bad}: {said}); "
                    f"run `sudo {remedy}`, or run the lab as root"
                )
    way = "run the lab as root" if rootless else "the lab needs them as root too"
    return (
        f"this machine does not let the lab make its namespaces ({said}); {way}, in a container with "
        f"--cap-add SYS_ADMIN --cap-add NET_ADMIN and without a seccomp profile"
    )


def why_command_failed(said: str) -> str:
    """The sentence for a network command that failed while the lab was being built."""
    for mark, module, thing in (
        ("netem", "sch_netem", "delay"),
        ("tbf", "sch_tbf", "a rate"),
        ("veth", "veth", "links"),
        ("bridge", "bridge", "switches"),
    ):
        unknown = "kind is unknown" in said or "Unknown device type" in said
        if mark in said and (unknown or "not supported" in said):
            return f"this kernel has no {mark} (module {module}), which the lab needs for {thing}"
    return f"the lab could not be built: {said}"
