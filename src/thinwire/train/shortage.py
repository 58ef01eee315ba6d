"""Out of memory in one sentence: what was held of what there is, how much more was asked for.

torch says it in four ways (CUDA's allocator, CUDA itself, the CPU's allocator, Python's MemoryError), of which the sentence
keeps the figures. Which setting would fit is for who can ask the planner: the figures travel with the error.
"""

import errno
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from thinwire.errors import ShortOfMemory
from thinwire.units import show_bytes

_ASKED = re.compile(
    r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)|Unable to allocate (\d+(?:\.\d+)?) ([KMGT]?i?B)"
)
_SAID = re.compile(r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|HIP error: out of memory")
_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@contextmanager
def shortage_explained(device: torch.device, *, sharing: int = 1, hint: str = "") -> Iterator[dict[str, int]]:
    """Running out of memory inside raises ShortOfMemory. What comes out is to be filled: state of the plan -> bytes.

    `sharing`: how many processes have this machine's memory. `hint`: a way out, for the end of the sentence.
    """
    held: dict[str, int] = {}
    try:
        yield held
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise explained(error, device, held, sharing, hint) from error


def is_shortage(error: BaseException) -> bool:
    """Whether memory could not be had; torch.OutOfMemoryError is a RuntimeError, as is what the CPU's allocator raises."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_SAID.search(str(error)))


def explained(
    error: BaseException, device: torch.device, held: Mapping[str, int], sharing: int, hint: str
) -> ShortOfMemory:
    """The sentence, with the figures for who can say what would fit."""
    asked = asked_bytes(str(error))
    cuda = device.type == "cuda" and not isinstance(error, OSError | MemoryError)
    used, most, capacity = _on_device(device) if cuda else _on_host(sharing)
    wanted = f"asked for {show_bytes(asked)} more" if asked else "needed more"
    states = ", ".join(f"{name} {show_bytes(count)}" for name, count in held.items() if count)
    parts = (
        f" (states of the plan: {states}; the rest activations, gradients on their way and the runtime)"
        if states
        else ""
    )
    peak = f", at most {show_bytes(most)} before" if most > used else ""
    where = torch.cuda.get_device_name(device) if cuda else "the host"
    sentence = (
        f"out of memory on {where}: it held {show_bytes(used)} of {show_bytes(capacity)}{peak}{parts}, and {wanted}"
        f"{hint and '; '}{hint}"
    )
    return ShortOfMemory(sentence, needed_bytes=max(most, used + asked), capacity_bytes=capacity)


def asked_bytes(text: str) -> int:
    """What was asked for, as torch or numpy say it; 0 if they do not."""
    found = _ASKED.search(text)
    if found is None:
        return 0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * _UNITS[unit])


def _on_device(device: torch.device) -> tuple[int, int, int]:
    """(bytes allocated, at most so far, the device's)."""
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), total


def _on_host(sharing: int) -> tuple[int, int, int]:
    """(bytes of this process, at most so far, what it may have): the least of its limit, its group's and its part of RAM."""
    told = dict(re.findall(r"^(Vm\w+):\s+(\d+) kB$", _text("/proc/self/status"), re.MULTILINE))
    used, most, reserved = (1024 * int(told.get(name, 0)) for name in ("VmRSS", "VmHWM", "VmSize"))
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    limits = [1024 * int(memory[1]) // sharing] if memory else []
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(max(0, address_space - (reserved - used)))  # what is reserved and not in memory counts too
    group = _text("/sys/fs/cgroup/memory.max").strip()
    if group.isdigit():
        limits.append(int(group) // sharing)
    return used, most, min(limits, default=0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
