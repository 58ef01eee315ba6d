"""Ranks of one host read each other's memory instead of pushing bytes through loopback's sockets.

A rank tells another where the row for it lies (in one run of bytes or in several), how long it is and what for; the
receiver, if it is in the same collective, copies it from there, or adds it up as it reads, and says that it has done so.
MPI libraries do the same between the processes of a node. Everything happens in the thread that issues and waits: gloo's
event threads, which spin while a send holds the connection, have no part in it.

Rows are read, and what others have read is learnt, in the order in which exchanges of a stream were issued, whichever is
waited for first. That order is the same on all ranks, so no two of them ever wait for each other. Streams are independent,
as communicators are: ranks may issue a weight all-gather and a gradient reduction in either order. Ranks that need not be
equally far keep their rows for some exchanges more, instead of waiting until the slowest has read them; rows that stay as
they are until `World.settle` (the weights of a step) are not waited for at all.

Both ends of an exchange name what it is for (a tag), and find out at once if they do not mean the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from thinwire.comm.transport.local_socket import DIVERGED, LocalSocket
from thinwire.comm.transport.process_memory import Run, add_rows, read_memory, rows_of
from thinwire.comm.transport.transport import (
    GRADS,
    OTHERS,
    PLAIN,
    WEIGHTS,
    Issued,
    Label,
    TaggedTransport,
    Waitable,
)  # fmt: skip
from thinwire.errors import LinkError, OtherExchangeError

_ROW, _RUN, _DONE = 1, 2, 3  # kinds of message, of stream 0; each stream has four numbers
_TAG_BIT = 24
"""Below a tag in a message of kind _ROW: the number of its runs."""


class Stream:
    """The exchanges under way of one stream, in the order of issue: those to read, and those that others may yet read."""

    def __init__(self, kept: int) -> None:
        self.unread, self.unacknowledged = deque["Reading"](), deque["Reading"]()
        self._kept = kept

    def settle(self, reading: "Reading") -> None:
        """Wait until others have read what was issued `kept` exchanges before `reading`, and all earlier ones."""
        while reading in self.unacknowledged and self.unacknowledged.index(reading) >= self._kept:
            self.unacknowledged.popleft().await_read()

    def forget_read(self) -> None:
        """Let go of the rows that all others are known to have read."""
        while self.unacknowledged and self.unacknowledged[0].read and self.unacknowledged[0].all_read():
            self.unacknowledged.popleft().await_read()

    def end(self) -> None:
        """Wait until others have read all that this rank has waited for."""
        while self.unacknowledged and self.unacknowledged[0].read:
            self.unacknowledged.popleft().await_read()


class Exchanges:
    """All exchanges of one rank."""

    def __init__(self, kept: int = 0) -> None:
        """`kept`: exchanges whose rows others may read after this rank has waited for them: rows must stay that long."""
        self.streams = tuple(Stream(kept) for _ in (OTHERS, WEIGHTS, GRADS))

    def end(self) -> None:
        """Wait until others have read all that this rank has waited for. Raises LinkError if one of them is gone."""
        for stream in self.streams:
            stream.end()


class Row:
    """What another rank has for this one, to be read from its beginning on."""

    def __init__(self, socket: LocalSocket, pid: int, note: int, label: Label) -> None:
        self._socket, self._pid, self._note, self._stream, self._tag = socket, pid, note, label.stream, label.tag
        self._runs = deque[Run]()

    def locate(self) -> None:
        """Wait to be told where it lies. Raises LinkError if the rank is gone, UseError if it is in another collective."""
        count, note = self._socket.receive(_kind(_ROW, self._stream))
        tag, count = count >> _TAG_BIT, count % (1 << _TAG_BIT)
        if (note, tag) != (self._note, self._tag):
            raise OtherExchangeError(
                f"this rank is in {_in_words(self._note)}, another of its host in {_in_words(note)}: ranks "
                "that share states must use the same units in the same order",
                self._tag,
                tag,
            )
        self._runs.extend(self._socket.receive(_kind(_RUN, self._stream)) for _ in range(count))

    def read(self, into: Tensor) -> None:
        """The next part of it, as long as `into`. Raises LinkError if the rank is gone."""
        if not read_memory(into, self._pid, self._take(into.nbytes)):
            raise LinkError(f"lost a rank of this host: the memory of process {self._pid} can no longer be read")

    def _take(self, size_bytes: int) -> list[Run]:
        taken: list[Run] = []
        while size_bytes > 0:
            address, length = self._runs.popleft()
            if length > size_bytes:
                self._runs.appendleft((address + size_bytes, length - size_bytes))
            taken.append((address, min(length, size_bytes)))
            size_bytes -= length
        return taken

    def done(self) -> None:
        self._socket.send((_kind(_DONE, self._stream), 0, 0))


class Reading:
    """An exchange under way: `wait` returns when this rank has read all its rows and its own ones have been read.

    Of exchanges that keep their rows, or whose rows last, it returns sooner, see `Stream`; the rows are held on to here.
    """

    def __init__(
        self,
        others: "SameHostTransport",
        rows: Mapping[int, Row],
        take: Callable[[], None],
        kept: Iterable[Tensor],
        label: Label,
    ) -> None:
        """`take` reads the rows once they are located; `kept` are this rank's own."""
        self._others, self._rows, self._take, self._kept = others, rows, take, tuple(kept)
        self._label, self._stream = label, others.exchanges.streams[label.stream]
        self.read = False
        self._stream.unread.append(self)
        self._stream.unacknowledged.append(self)

    def wait(self) -> None:
        """Raises LinkError if a rank is gone, UseError if it is in another collective."""
        try:
            while not self.read:
                self._stream.unread.popleft()._carry_out()
        except OtherExchangeError as error:
            for socket in self._others.sockets.values():  # those that wait for something else would not find out
                socket.send((DIVERGED, error.theirs, error.mine))
            raise
        if self._label.lasting:
            self._stream.forget_read()
        else:
            self._stream.settle(self)

    def _carry_out(self) -> None:
        for row in self._rows.values():
            row.locate()
        self._take()
        for row in self._rows.values():
            row.done()
        self.read = True

    def await_read(self) -> None:
        """Wait until the others have read this rank's rows."""
        for place in self._rows:
            self._others.sockets[place].receive(_kind(_DONE, self._label.stream))
        self._kept = ()

    def all_read(self) -> bool:
        """Whether `await_read` would return at once."""
        return all(self._others.sockets[place].has_received(_kind(_DONE, self._label.stream)) for place in self._rows)


class SameHostTransport(TaggedTransport):
    """`thinwire.comm.transport.transport.Transport` of ranks that are all on this host, this one at place `me` of them.

    Process ids and sockets are by place. All groups of a rank share its exchanges. Rows are contiguous, and stay as they are
    until the exchange has been waited for, or longer (`Label.lasting`). Both ends must mean a gather, or an all-to-all.
    """

    reads_memory = True

    def __init__(self, me: int, pids: Sequence[int], sockets: Mapping[int, LocalSocket], exchanges: Exchanges) -> None:
        super().__init__(me, len(pids))
        self.pids, self.sockets, self.exchanges = pids, sockets, exchanges

    def reduce_scatter(self, out_n: Tensor, pieces: Sequence[Tensor], *, label: Label = PLAIN) -> Issued:
        """Pieces are read from where they are, and added up while they are read."""
        if pieces[0].dtype != out_n.dtype:
            return super().reduce_scatter(out_n, pieces, label=label)
        rows = rows_of(pieces, self._k)
        added = self._add_up(out_n.view(-1), rows, label)
        return Issued([added], (out_n, *(piece for row in rows for piece in row)))

    def compare(self, tag: int) -> Sequence[Waitable]:
        nothing = torch.empty(self._k, 0, dtype=torch.uint8)
        return self._exchange(nothing, list(nothing), self._places(None), gathers=True, label=Label(WEIGHTS, tag))

    def _exchange(
        self, received_kn: Tensor, rows: Sequence[Tensor], places: Sequence[int], *, gathers: bool, label: Label
    ) -> Sequence[Waitable]:
        sources, targets = self._around(places)
        received = {places[j]: received_kn[j] for j in sources}
        sent = {places[j]: rows[j] for j in targets}
        for place, row in sent.items():
            self._tell(place, [row], _note(row.nbytes, gathers=gathers), label)
        theirs = {
            place: self._row(place, _note(into.nbytes, gathers=gathers), label) for place, into in received.items()
        }

        def take() -> None:
            for place, into in received.items():
                theirs[place].read(into)

        return [Reading(self, theirs, take, sent.values(), label)]

    def _add_up(self, out: Tensor, rows: Sequence[Sequence[Tensor]], label: Label) -> Reading:
        """`out` becomes the sum of everybody's row for this rank, in the order of places.

        `rows[place]` is for the rank there, in contiguous pieces that follow one another, all of `out`'s precision; they
        must stay as they are until the exchange has been waited for, but that `out` may be this rank's own row.
        """
        note = _note(out.nbytes, gathers=False)
        theirs = {place: self._row(place, note, label) for place in range(len(rows)) if place != self._me}
        for place in theirs:
            self._tell(place, rows[place], note, label)
        own = rows[self._me]

        def take() -> None:
            add_rows([theirs.get(place) for place in range(len(rows))], own, out)

        return Reading(self, theirs, take, (piece for row in rows for piece in row), label)

    def _tell(self, place: int, pieces: Sequence[Tensor], note: int, label: Label) -> None:
        assert all(piece.is_contiguous() for piece in pieces), "rows are read as runs of bytes"
        runs = [(_kind(_RUN, label.stream), piece.data_ptr(), piece.nbytes) for piece in pieces]
        self.sockets[place].send((_kind(_ROW, label.stream), (label.tag << _TAG_BIT) + len(runs), note), *runs)

    def _row(self, place: int, note: int, label: Label) -> Row:
        return Row(self.sockets[place], self.pids[place], note, label)

    def close(self) -> None:
        for socket in self.sockets.values():
            socket.close()


def _kind(message: int, stream: int) -> int:
    return message + 4 * stream


def _note(size_bytes: int, *, gathers: bool) -> int:
    """What both ends of an exchange must agree on, beside the tag."""
    return 2 * size_bytes + gathers


def _in_words(note: int) -> str:
    return f"an {'all-gather' if note % 2 else 'all-to-all'} with rows of {note // 2} bytes"
