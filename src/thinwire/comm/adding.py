"""Adding up rows that lie in other ranks' memory while they are read, chunk by chunk, and dealing flat pieces into rows.

Plain tensors and whatever can be read from: how a row is heard of and read is `thinwire.comm.neighbours`'s.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

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
