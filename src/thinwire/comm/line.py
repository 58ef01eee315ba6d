"""A socket between two ranks of one host, for short messages: a kind and two numbers each."""

import socket
import struct
from collections import defaultdict, deque

from thinwire.errors import LinkError

_MESSAGE = struct.Struct("=Bqq")


class Line:
    """Says and hears messages; those of one kind arrive in the order in which they were said."""

    def __init__(self, end: socket.socket, timeout_s: float) -> None:
        end.settimeout(timeout_s)
        self._socket, self._unread = end, b""
        self._heard: defaultdict[int, deque[tuple[int, int]]] = defaultdict(deque)

    def say(self, *messages: tuple[int, int, int]) -> None:
        """Each is a kind and two numbers. Raises LinkError if the other end is gone, or has not listened in time."""
        try:
            self._socket.sendall(b"".join(_MESSAGE.pack(*message) for message in messages))
        except OSError as error:
            raise LinkError(f"lost a rank of this host: {error}") from error

    def hear(self, kind: int) -> tuple[int, int]:
        """The next message of a kind, as (number, note). Raises LinkError if the other end is gone or silent for long."""
        while not self._heard[kind]:
            try:
                received = self._socket.recv(4096)
            except OSError as error:
                raise LinkError(f"lost a rank of this host while waiting for it: {error}") from error
            if not received:
                raise LinkError("lost a rank of this host: it closed its connection")
            data = self._unread + received
            whole = len(data) - len(data) % _MESSAGE.size
            for said, number, note in _MESSAGE.iter_unpack(data[:whole]):
                self._heard[said].append((number, note))
            self._unread = data[whole:]
        return self._heard[kind].popleft()

    def close(self) -> None:
        self._socket.close()
