"""This machine's network interfaces, those that the user wants, and the addresses at which each rank is reached. No torch.

A rank's first choice is the address from which its connection to rank 0 leaves; on rank 0's host, that at which the other
hosts have reached it. Which way is taken is tried, and decided by all, in `thinwire.comm.rendezvous`.
"""

import os
import socket
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from thinwire.errors import ConfigError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Address(NamedTuple):
    """An IP address of an interface."""

    interface: str
    ip: str

    @property
    def is_loopback(self) -> bool:
        return self.ip == "::1" or self.ip.startswith("127.")

    def __str__(self) -> str:
        return f"{self.interface} ({self.ip})"


def addresses() -> list[Address]:
    """Of all interfaces that are up, IPv4 before IPv6; those that only mean something on one link are left out."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    return [
        Address(name, entry.address)
        for family in _FAMILIES
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == family and not entry.address.lower().startswith("fe80:")
    ]


def asked(
    interface: str | None, environment: Mapping[str, str], here: Sequence[Address], *, cuda: bool
) -> list[Address]:
    """The addresses of the interfaces that are to be used; none if that was left open.

    `interface` (`cluster.interface`) and GLOO_SOCKET_IFNAME name one interface or several, with commas between them. With
    `cuda`, NCCL_SOCKET_IFNAME counts too. Raises ConfigError if they contradict each other, or this machine lacks one.
    """
    given = environment.get(GLOO, "")
    if interface and given and _names(interface) != _names(given):
        raise ConfigError(f"cluster.interface = {interface!r}, but {GLOO} = {given!r}; leave one of them out")
    chosen = _names(interface or given)
    found = [_find(name, "cluster.interface" if interface else GLOO, here) for name in chosen]
    if cuda:
        _check_nccl(environment.get(NCCL, ""), _names(interface or ""), here)
    return found


def selects(pattern: str, name: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME = `pattern` lets NCCL use `name`: `eth` (a beginning), `=eth0`, `^docker`, `^=lo`."""
    excludes, rest = pattern.startswith("^"), pattern.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    named = any(name == word if exact else name.startswith(word) for word in _names(rest))
    return named != excludes


def tell_libraries(environment: MutableMapping[str, str], names: Sequence[str], *, between_hosts: bool) -> None:
    """Name the interfaces to NCCL and to torch's own gloo groups, which hear of them in no other way.

    What is set already stays. On one host NCCL finds its own way, past sockets.
    """
    environment.setdefault(GLOO, ",".join(names))
    if between_hosts:
        environment.setdefault(NCCL, f"={','.join(names)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _find(name: str, source: str, here: Sequence[Address]) -> Address:
    for address in here:
        if address.interface == name:
            return address
    has = ", ".join(map(str, here)) or "none"
    raise ConfigError(
        f"{source} names {name!r}, but {socket.gethostname()} has no such interface with an address; it has {has}"
    )


def _check_nccl(pattern: str, wanted: Sequence[str], here: Sequence[Address]) -> None:
    if not pattern:
        return
    usable = [address for address in here if selects(pattern, address.interface)]
    if not usable:
        has = ", ".join(map(str, here)) or "none"
        raise ConfigError(f"{NCCL} = {pattern!r} leaves {socket.gethostname()} no interface; it has {has}")
    left_out = [name for name in wanted if not selects(pattern, name)]
    if left_out:
        raise ConfigError(
            f"cluster.interface names {left_out[0]!r}, but {NCCL} = {pattern!r} leaves it out; unset one of them"
        )


Route = tuple[Address, ...]
"""The addresses that a rank listens on: one, or one for each interface that was asked for."""


@dataclass(frozen=True)
class Presence:
    """What a rank says of itself. `machine`: ranks that share it share interfaces; `pids`: ... share process numbers."""

    rank: int
    host: str
    pid: int
    machine: str
    pids: str
    port: int
    """Where its server answers."""
    local: Address | None
    """From where it has reached rank 0."""
    reached: str | None
    """At which of rank 0's addresses."""
    here: tuple[Address, ...]
    asked: Route
    route: Route = ()
    """Decided by all."""

    @staticmethod
    def of_this_process(
        rank: int, port: int, here: Sequence[Address], asked: Sequence[Address], ends: tuple[str, str] | None
    ) -> "Presence":
        """`ends`: the addresses of both ends of the connection to rank 0."""
        boot, network, pids = _boot(), _inode("net"), _inode("pid")
        local = None if ends is None else next((each for each in here if each.ip == ends[0]), None)
        return Presence(
            rank, socket.gethostname(), os.getpid(), f"{boot}/{network}", f"{boot}/{pids}", port,
            local, None if ends is None else ends[1], tuple(here), tuple(asked),
        )  # fmt: skip

    @staticmethod
    def read(told: Mapping[str, Any]) -> "Presence":
        """From JSON."""
        address = told["local"]
        routes = {name: tuple(Address(*each) for each in told[name]) for name in ("here", "asked", "route")}
        return Presence(**{**told, **routes, "local": None if address is None else Address(*address)})

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def over(self) -> str:
        return ", ".join(map(str, self.route))


def possible_routes(everyone: Sequence[Presence]) -> list[list[Route]]:
    """For every rank its possible routes, best first. Where all are on one host, loopback is one."""
    reached = Counter(each.reached for each in everyone if each.machine != everyone[0].machine)
    if all(each.machine == everyone[0].machine for each in everyone):
        reached = Counter(each.reached for each in everyone if each.reached is not None)
    first = [ip for ip, _ in sorted(reached.items(), key=lambda item: (-item[1], str(item[0])))]
    return [_routes_of(each, first if each.machine == everyone[0].machine else [], everyone) for each in everyone]


def _routes_of(rank: Presence, first: Sequence[str | None], everyone: Sequence[Presence]) -> list[Route]:
    if rank.asked:
        return [rank.asked]
    alone = all(each.machine == rank.machine for each in everyone)
    liked = [address for ip in first for address in rank.here if address.ip == ip]
    if not first and rank.local is not None:
        liked = [rank.local]
    order = dict.fromkeys([*liked, *rank.here])
    return [(address,) for address in order if alone or not address.is_loopback]


def leaders(everyone: Sequence[Presence], routes: Sequence[Sequence[Route]]) -> list[int]:
    """For every rank the first one that shares its host and its routes: what holds for that one holds for it."""
    seen: dict[tuple[Any, ...], int] = {}
    return [
        seen.setdefault((each.machine, *of_rank), each.rank) for each, of_rank in zip(everyone, routes, strict=True)
    ]


def advice(rank: Presence, routes: Sequence[Route]) -> str:
    """What to do about a rank that is reached in none of these ways."""
    if rank.asked:
        told = f"rank {rank.rank} was told to use {listed(rank.asked)}"
        return f"{told}; name an interface that leads to the others, or leave it out"
    has = ", ".join(listed(route) for route in routes)
    return (
        f"rank {rank.rank} has {has}; connect the hosts, or name an interface that leads to the others in "
        "cluster.interface"
    )


def listed(addresses: Sequence[Address]) -> str:
    """In words."""
    return ", ".join(map(str, addresses)) or "none"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _inode(space: str) -> int:
    """The namespace of that kind that this process is in."""
    try:
        return Path(f"/proc/self/ns/{space}").stat().st_ino
    except OSError:
        return -1
