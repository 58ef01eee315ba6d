"""Network and name (UTS) namespaces of this process: make one, enter one. Thin calls of the C library; Linux only."""

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NEW_NET, _NEW_UTS = 0x40000000, 0x04000000


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@dataclass(frozen=True)
class Namespaces:
    """A network and a UTS namespace, held by file descriptors: they live as long as these or a process in them."""

    net: int
    uts: int

    @staticmethod
    def current() -> "Namespaces":
        """Those this process is in."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        return Namespaces(os.open("/proc/self/ns/net", flags), os.open("/proc/self/ns/uts", flags))

    @staticmethod
    def new(name: str) -> "Namespaces":
        """New ones with host name `name`; this process stays where it is."""
        home = Namespaces.current()
        try:
            _call("unshare", _NEW_NET | _NEW_UTS)
            socket.sethostname(name)
            return Namespaces.current()
        finally:
            home.enter()
            home.close()

    def enter(self) -> None:
        """Put the calling process into them, for good."""
        _call("setns", self.net, _NEW_NET)
        _call("setns", self.uts, _NEW_UTS)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in them for a while."""
        home = Namespaces.current()
        self.enter()
        try:
            yield
        finally:
            home.enter()
            home.close()

    def pids(self) -> list[int]:
        """Processes whose network namespace this is."""
        inode = os.fstat(self.net).st_ino
        names = [entry.name for entry in Path("/proc").iterdir()]
        return [pid for pid in map(int, filter(str.isdigit, names)) if _inode_of(pid) == inode]

    def close(self) -> None:
        os.close(self.net)
        os.close(self.uts)


def _inode_of(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None
