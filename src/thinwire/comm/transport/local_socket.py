"""A socket between two ranks of one host, for short messages: a kind and two numbers each.

Sending never blocks, however many messages are on their way: what the socket cannot take is sent by a thread, which exists
only as long as there is such a rest. If a rank waited there until the other end reads, ranks that all post before anybody
reads (a deep model's weight all-gathers after the step) would wait for each other for ever.
"""

import select
import socket
import struct
import threading
import time
from collections import defaultdict, deque

from thinwire.errors import LinkError, OtherExchangeError

DIVERGED = 0
"""The kind of message with which a rank says that it is in another exchange than those at the other ends: two tags."""
_MESSAGE = struct.Struct("=Bqq")
_POLL_MS = 1000


class LocalSocket:
    """Sends and receives messages; those of one kind arrive in the order in which they were sent.

    `name` is the rank at the other end, as errors call it.
    """

    def __init__(self, end: socket.socket, timeout_s: float, name: str = "a rank of this host") -> None:
        end.setblocking(False)
        self.name = name
        self._socket, self._timeout_s, self._unread = end, timeout_s, b""
        self._received: defaultdict[int, deque[tuple[int, int]]] = defaultdict(deque)
        self._unsent, self._sending, self._closed = bytearray(), threading.Lock(), False

    def send(self, *messages: tuple[int, int, int]) -> None:
        """Each is a kind and two numbers. Never fails: `receive` tells that the other end is gone, at last."""
        data = b"".join(_MESSAGE.pack(*message) for message in messages)
        with self._sending:
            if not self._unsent:
                data = data[self._push(data) :]
                if data:
                    threading.Thread(target=self._push_rest, name="local socket", daemon=True).start()
            self._unsent += data

    def _push(self, data: bytes | bytearray) -> int:
        """Bytes of `data` that are done with: the socket takes them, or nobody will."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _push_rest(self) -> None:
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        while True:
            room.poll(_POLL_MS)
            with self._sending:
                if not self._closed:
                    del self._unsent[: self._push(self._unsent)]
                if self._closed or not self._unsent:
                    return

    def receive(self, kind: int) -> tuple[int, int]:
        """The next message of a kind, as (number, note).

        Raises LinkError if the other end is gone or silent for long, OtherExchangeError if it says so.
        """
        end_s = time.monotonic() + self._timeout_s
        while not self._received[kind]:
            if self._received[DIVERGED]:
                raise OtherExchangeError(
                    "another rank of this host is in another exchange", *self._received[DIVERGED][0]
                )
            self._take_in(end_s - time.monotonic())
        return self._received[kind].popleft()

    def has_received(self, kind: int) -> bool:
        """Whether `receive` of a kind would return at once."""
        if not self._received[kind]:
            self._take_in(None)
        return bool(self._received[kind])

    def _take_in(self, wait_s: float | None) -> None:
        """Take in what has arrived; if nothing has, the first that does within `wait_s` seconds (None: do not wait)."""
        try:
            received = self._socket.recv(4096)
        except BlockingIOError:
            if wait_s is not None:
                self._wait(wait_s)
            return
        except OSError as error:
            raise LinkError(f"lost {self.name} while waiting for it: {error}") from error
        if not received:
            raise LinkError(f"lost {self.name}: it closed its connection")
        data = self._unread + received
        whole = len(data) - len(data) % _MESSAGE.size
        for kind, number, note in _MESSAGE.iter_unpack(data[:whole]):
            self._received[kind].append((number, note))
        self._unread = data[whole:]

    def _wait(self, wait_s: float) -> None:
        come = select.poll()
        come.register(self._socket, select.POLLIN)
        if wait_s <= 0 or not come.poll(wait_s * 1000):
            raise LinkError(f"lost {self.name} while waiting for it: timed out, silent for {self._timeout_s:g} s")

    def close(self) -> None:
        with self._sending:
            self._closed = True
            self._socket.close()
