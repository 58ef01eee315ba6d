"""This machine's network interfaces, and those that the user wants ranks to talk over. No torch."""

import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

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
