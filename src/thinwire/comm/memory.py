"""Reading the memory of another process of this host: Linux's cross-memory attach, one copy by the kernel."""

import ctypes
import os
from pathlib import Path

from torch import Tensor

_PR_SET_PTRACER, _YAMA = 0x59616D61, Path("/proc/sys/kernel/yama/ptrace_scope")


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_memory(into: Tensor, pid: int, address: int) -> bool:
    """Fill a contiguous `into` from `address` on in the memory of a process; False if that cannot be had."""
    try:
        read = ctypes.CDLL(None).process_vm_readv
    except AttributeError:  # not Linux
        return False
    read.restype = ctypes.c_ssize_t
    done = 0
    while done < into.nbytes:
        here = _Piece(into.data_ptr() + done, into.nbytes - done)
        there = _Piece(address + done, into.nbytes - done)
        got = read(ctypes.c_int(pid), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if got <= 0:
            return False
        done += got
    return True


def permit_siblings() -> None:
    """Where Yama lets only ancestors read a process, let all that this process's parent started do so."""
    try:
        restricted = _YAMA.read_text().strip() == "1"
    except OSError:
        return
    if restricted:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)
