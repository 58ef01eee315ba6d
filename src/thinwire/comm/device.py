"""What a rank computes on: its own accelerator, or one that ranks of its host share because the run says so; and its heap.

glibc gives the top of the heap back to the kernel as soon as a few MB of it are free. A step frees its activations and
gradients at every micro-batch and takes them again at once, page by page, each page cleared by the kernel: on small
micro-batches a sixth of a CPU's backward.
"""

import ctypes
import os
import socket

import torch
import torch.distributed as dist

from thinwire.cluster.cluster import Cluster
from thinwire.errors import ConfigError

_KIND, _TAKEN = "thinwire/device/kind", "thinwire/device/taken/"


def rank_device(cluster: Cluster, local_rank: int) -> torch.device:
    """The device of the host's rank `local_rank`, made this process's current one. Raises ConfigError if torch sees none."""
    if cluster.device.kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.device is {cluster.device.name}, but torch {torch.__version__} sees no GPU here; install a torch with "
            f'CUDA or ROCm and check the driver, or set cluster.device = "cpu"'
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # what names no device (synchronising, pinned memory) means this one
    return device


def claim(store: dist.Store, device: torch.device, *, rank: int, share: bool) -> None:
    """Tell the others what this rank computes on. Raises ConfigError on the rank that finds another kind, or its GPU taken.

    NCCL would hang, or fail in words of its own. Ranks that see one GPU each (a scheduler's binding) pass: what counts is
    which one it is.
    """
    theirs = store.compare_set(_KIND, "", device.type).decode()
    if theirs != device.type:
        raise ConfigError(
            f"rank {rank} on {socket.gethostname()} would compute on {device.type}, others on {theirs}; set cluster.device "
            f"in the run file so that all do the same"
        )
    if device.type != "cpu" and not share and store.add(_TAKEN + _identity(device), 1) > 1:
        raise ConfigError(
            f"rank {rank} on {socket.gethostname()} would share {torch.cuda.get_device_name(device)} with another rank: it "
            f"sees {torch.cuda.device_count()}; start at most as many ranks on a host as it has GPUs, or, to test several "
            f"on one card, set cluster.share_device = true"
        )


def _identity(device: torch.device) -> str:
    """Of a GPU among all hosts. Parts of one (MIG) may go by its identifier: the environment tells them apart."""
    part = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    uuid = torch.cuda.get_device_properties(device).uuid
    return f"{uuid}/{part if 'MIG-' in part else ''}"


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h; setting one ends glibc's own choice of the other."""
_NEVER, _LARGEST = 2**31 - 1, 32 * 2**20
"""The second is the most that glibc takes; larger pieces get a mapping of their own whatever is set."""
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_heap() -> bool:
    """Tell the C library that freed memory stays with this process; True if it took it.

    Nothing changes where the user has set the allocator through the environment, and without glibc.
    """
    if any(name in os.environ for name in _OWN_CHOICE):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _NEVER))
