"""Ranks of one host read each other's memory instead of pushing bytes through loopback's sockets.

A rank tells another where the row for it lies, how long it is and what for; the receiver, if it is in the same
collective, copies it from there and says that it has done so. MPI libraries do the same between the processes of a node.
Everything happens in the thread that issues and waits: gloo's event threads, which spin while a send holds the
connection, have no part in it.

Rows are read, and what others have read is heard of, in the order in which exchanges were issued, whichever is waited for
first. That order is the same on all ranks, so no two of them ever wait for each other.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from thinwire.comm.line import Line
from thinwire.comm.memory import read_memory
from thinwire.errors import LinkError, UseError

_ADDRESS, _DONE = 1, 2  # kinds of message


class Exchanges:
    """All exchanges under way of one rank, in the order of issue: those to read, and those that others may yet read."""

    def __init__(self) -> None:
        self.unread, self.unacknowledged = deque["Reading"](), deque["Reading"]()


class Reading:
    """An exchange under way: `wait` returns when this rank has read all its rows and its own ones have been read."""

    def __init__(self, into: Mapping[int, Tensor], others: "Neighbours", *, gathers: bool) -> None:
        self._into, self._others, self._gathers = into, others, gathers
        self._read, self._acknowledged = False, False
        others.exchanges.unread.append(self)
        others.exchanges.unacknowledged.append(self)

    def wait(self) -> None:
        """Raises LinkError if a rank is gone, UseError if it is in another collective."""
        while not self._read:
            self._others.exchanges.unread.popleft()._carry_out()
        while not self._acknowledged:
            self._others.exchanges.unacknowledged.popleft()._hear_all()

    def _carry_out(self) -> None:
        for place, into in self._into.items():
            line, pid = self._others.lines[place], self._others.pids[place]
            address, note = line.hear(_ADDRESS)
            expected = _note(into, gathers=self._gathers)
            if note != expected:
                raise UseError(
                    f"this rank is in {_in_words(expected)}, another of its host in {_in_words(note)}: ranks "
                    "that share states must use the same units in the same order"
                )
            if not read_memory(into, pid, address):
                raise LinkError(f"lost a rank of this host: the memory of process {pid} can no longer be read")
            line.say(_DONE, 0)
        self._read = True

    def _hear_all(self) -> None:
        for place in self._into:
            self._others.lines[place].hear(_DONE)
        self._acknowledged = True


class Neighbours:
    """The ranks of a group, all on this host: process ids and lines by place. All groups of a rank share its exchanges."""

    def __init__(self, pids: Sequence[int], lines: Mapping[int, Line], exchanges: Exchanges) -> None:
        self.pids, self.lines, self.exchanges = pids, lines, exchanges

    def exchange(self, received: Mapping[int, Tensor], rows: Mapping[int, Tensor], *, gathers: bool) -> Reading:
        """`received[place]` becomes what the rank there has for this one; `rows[place]` is for it.

        `gathers` tells a gather from an all-to-all: both ends must mean the same one.
        All are contiguous. Rows must stay as they are until the exchange has been waited for.
        """
        for place, row in rows.items():
            assert row.is_contiguous() and received[place].is_contiguous(), "rows are read as one run of bytes"
            self.lines[place].say(_ADDRESS, row.data_ptr(), _note(row, gathers=gathers))
        return Reading(received, self, gathers=gathers)

    def close(self) -> None:
        for line in self.lines.values():
            line.close()


def _note(row: Tensor, *, gathers: bool) -> int:
    """What both ends of an exchange must agree on."""
    return 2 * row.nbytes + gathers


def _in_words(note: int) -> str:
    return f"an {'all-gather' if note % 2 else 'all-to-all'} with rows of {note // 2} bytes"
