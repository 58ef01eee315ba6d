"""The memory of other processes of this host: reading it, and adding up rows while they are read, chunk by chunk.

Linux's cross-memory attach (process_vm_readv): one copy by the kernel, from wherever the rows lie. A segment of POSIX shared
memory has to hold a copy of every row that is under way; all-gathers over one took 1.07 to 1.24 times as long (2 ranks, 16
and 64 MiB), reduce-scatters 0.80 to 0.98.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
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


_MOST_READS = 64
"""Rows in more runs of bytes are made one first."""
_CHUNK = 2**17
"""Elements that are read and added up at a time, while they are in the processor's cache."""


class Readable(Protocol):
    """A row, read from its beginning on."""

    def read(self, into: Tensor) -> None: ...


def rows_of(pieces: Sequence[Tensor], k: int) -> list[list[Tensor]]:
    """The concatenation of flat `pieces` in `k` rows of one length, each in pieces; one piece if there were too many."""
    n = sum(piece.numel() for piece in pieces) // k
    rows: list[list[Tensor]] = [[] for _ in range(k)]
    begin = 0
    for piece in pieces if len(pieces) <= _MOST_READS else [torch.cat(list(pieces))]:
        end = begin + piece.numel()
        for row in range(begin // n, -(-end // n)) if n else ():
            first, last = max(begin, row * n), min(end, (row + 1) * n)
            if first < last:
                rows[row].append(piece[first - begin : last - begin])
        begin = end
    return rows


def add_rows(rows: Sequence[Readable | None], own: Sequence[Tensor], out: Tensor) -> None:
    """`out` becomes the sum of the rows in their order; `own` is the one that is None. Chunk by chunk."""
    room = out.new_empty(min(2, len(rows) - 1), min(_CHUNK, out.numel()))
    done = 0
    for piece in own:
        for chunk in torch.split(piece, _CHUNK):
            _add_chunk(rows, chunk, out[done : done + len(chunk)], room[:, : len(chunk)])
            done += len(chunk)


def _add_chunk(rows: Sequence[Readable | None], own: Tensor, out: Tensor, room: Tensor) -> None:
    """One chunk of it; `room` is scratch for what is read, and for sums that are not the last."""
    total = own
    for number, row in enumerate(rows):
        part = own if row is None else room[0 if number == 0 else -1]
        if row is not None:
            row.read(part)
        last = number == len(rows) - 1
        total = part if number == 0 else torch.add(total, part, out=out if last else room[0])
