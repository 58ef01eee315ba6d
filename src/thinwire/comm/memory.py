"""Reading the memory of another process of this host: Linux's cross-memory attach, one copy by the kernel."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_PR_SET_PTRACER, _YAMA = 0x59616D61, Path("/proc/sys/kernel/yama/ptrace_scope")


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


Run = tuple[int, int]
"""Address and length of bytes that lie together in the memory of a process."""
_MOST_RUNS = 1024
"""IOV_MAX: what the kernel takes in one call."""


@cache
def _reader() -> Any:
    """The system call, or None where there is none."""
    try:
        read = ctypes.CDLL(None).process_vm_readv
    except AttributeError:  # not Linux
        return None
    read.restype = ctypes.c_ssize_t
    return read


def read_memory(into: Tensor, pid: int, runs: Sequence[Run]) -> bool:
    """Fill a contiguous `into` with the bytes of `runs`, of as many in all, in a process's memory; False if it cannot."""
    read, done = _reader(), 0
    if read is None:
        return False
    while done < into.nbytes:
        pieces = [_Piece(*run) for run in runs[:_MOST_RUNS]]
        here = _Piece(into.data_ptr() + done, into.nbytes - done)
        got = read(ctypes.c_int(pid), ctypes.byref(here), 1, (_Piece * len(pieces))(*pieces), len(pieces), 0)
        if got <= 0:
            return False
        done += got
        runs = _rest(runs, got)
    return True


def _rest(runs: Sequence[Run], done: int) -> list[Run]:
    """What is left of runs after so many bytes."""
    left: list[Run] = []
    for address, length in runs:
        gone = min(done, length)
        done -= gone
        if gone < length:
            left.append((address + gone, length - gone))
    return left


def permit_siblings() -> None:
    """Where Yama lets only ancestors read a process, let all that this process's parent started do so."""
    try:
        restricted = _YAMA.read_text().strip() == "1"
    except OSError:
        return
    if restricted:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)
