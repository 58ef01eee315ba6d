"""Which transport a group has: what its communicators take, or, where ranks are on one host, reading memory.

Whether ranks may read each other's memory is found out when they meet, by trying it.

Containers, users and machines keep processes apart, and network namespaces are hosts: processes in different ones talk
over links, even on one machine.
"""

import os
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from thinwire.comm.transport.gloo import GlooTransport
from thinwire.comm.transport.local_socket import LocalSocket
from thinwire.comm.transport.nccl import NcclTransport
from thinwire.comm.transport.process_memory import permit_siblings, read_memory
from thinwire.comm.transport.same_host import Exchanges, SameHostTransport
from thinwire.comm.transport.transport import Transport, all_gather_single
from thinwire.errors import LinkError

_CREDENTIALS = struct.Struct("3i")  # struct ucred


def transport_of(group: dist.ProcessGroup) -> Transport:
    """What the group's library makes of it. NCCL takes tensors of accelerators as they are, gloo does not."""
    kinds = cast(Any, group)._device_types  # torch's stubs lack what a group was made for
    return NcclTransport(group) if any(kind.type != "cpu" for kind in kinds) else GlooTransport(group)


def find_same_host(group: dist.ProcessGroup, exchanges: Exchanges, *, timeout_s: float) -> SameHostTransport | None:
    """The ranks of a gloo group, if every one can read every other's memory and talk to it; the same answer on all.

    Raises LinkError if ranks that can do so do not connect in time.
    """
    token = torch.tensor([secrets.randbits(62)])
    permit_siblings()
    with socket.socket(socket.AF_UNIX) as listener:
        is_open = _listen(listener, int(token), group.size())
        everyone = _tell_all(group, [_network(), os.getpid(), token.data_ptr(), int(token), is_open])
        readable = all(_readable(other, _network()) for other in everyone)
        if not all(agrees for (agrees,) in _tell_all(group, [readable])):
            return None
        pids, tokens = [pid for _, pid, *_ in everyone], [token for *_, token, _ in everyone]
        try:
            sockets = {place: _call(tokens[place], timeout_s) for place in range(group.rank())}
            listener.settimeout(timeout_s)
            while len(sockets) < group.size() - 1:
                caller, _ = listener.accept()
                if (pid := _pid_of(caller)) in pids:  # anyone may call
                    sockets[pids.index(pid)] = LocalSocket(caller, timeout_s)
        except OSError as error:
            raise LinkError(f"ranks of one host could not connect to each other: {error}") from error
    return SameHostTransport(group.rank(), pids, sockets, exchanges)


def _listen(listener: socket.socket, token: int, backlog: int) -> bool:
    """Abstract names (Linux) live in a network namespace and vanish with the process."""
    try:
        listener.bind(_name(token))
        listener.listen(backlog)
    except OSError:
        return False
    return True


def _call(token: int, timeout_s: float) -> LocalSocket:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(timeout_s)
    end.connect(_name(token))
    return LocalSocket(end, timeout_s)


def _pid_of(end: socket.socket) -> int:
    """The process at the other end, as the kernel knows it."""
    pid: int = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


def _name(token: int) -> str:
    return f"\0thinwire-{token:016x}"


def _tell_all(group: dist.ProcessGroup, numbers: Sequence[int]) -> list[list[int]]:
    everyone = torch.empty(group.size(), len(numbers), dtype=torch.int64)
    all_gather_single(everyone.view(-1), torch.tensor(numbers, dtype=torch.int64), group=group).wait()
    told: list[list[int]] = everyone.tolist()
    return told


def _readable(other: Sequence[int], network: int) -> bool:
    theirs, pid, address, token, is_open = other
    found = torch.zeros(1, dtype=torch.int64)
    return (
        bool(is_open)
        and theirs == network
        and read_memory(found, pid, [(address, found.nbytes)])
        and int(found) == token
    )


def _network() -> int:
    """This process's network namespace."""
    try:
        return Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        return -1
