"""Hosts with two networks each, of which only one joins them: `eth0` ends at a switch of its own, `eth1` at a common one.

Every host's name resolves to its eth0, the wrong one.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from thinwire.lab.host import Inside, new_name

PORT = 29_500
SOURCE = Path(__file__).parents[1] / "src"


def alone(host: int) -> str:
    return f"10.9.0.{host + 1}"


def joined(host: int) -> str:
    return f"10.8.0.{host + 1}"


class Hosts:
    """Processes on the hosts, their output and how they ended."""

    def __init__(self, inside: Inside, folder: Path, count: int) -> None:
        self._inside, self._folder, self._count = inside, folder, count
        self._logs: list[Path] = []

    def start(self, host: int, words: Sequence[str], **environment: str) -> int:
        """A process on a host, without a word about interfaces; its number."""
        kept = {key: value for key, value in os.environ.items() if "IFNAME" not in key}
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{SOURCE}:{Path(__file__).parent}"}
        log = self._folder / f"process-{len(self._logs)}.log"
        self._logs.append(log)
        argv, cwd = [sys.executable, *words], str(self._folder)
        number: int = self._inside.ask(
            "spawn", host=host, argv=argv, environment={**kept, **own, **environment}, cwd=cwd, log=str(log)
        )
        return number

    def start_ranks(self, words: Sequence[str], *, at: str | None = None, **environment: str) -> None:
        """A rank on every host; they are told to meet at `at`."""
        place = {"WORLD_SIZE": str(self._count), "LOCAL_RANK": "0", "MASTER_PORT": str(PORT)}
        for rank in range(self._count):
            self.start(rank, words, RANK=str(rank), MASTER_ADDR=at or joined(0), **place, **environment)

    def ends(self, seconds: float) -> list[int | None]:
        """Exit status of every process, None for those that still run after that time."""
        end_s = time.monotonic() + seconds
        while None in (statuses := self._inside.ask("status")) and time.monotonic() < end_s:
            time.sleep(0.05)
        return list(statuses)

    def signal(self, number: int, rank: int) -> None:
        assert self._inside.ask("signal", number=number, host=rank, rank=rank)

    def cut(self, host: int) -> None:
        """Pull the cable of the common network out of a host."""
        self._inside.ask("run", commands=[(None, ["ip", "link", "set", f"b{host}", "down"])])

    def output(self, number: int) -> str:
        return self._logs[number].read_text(errors="replace")


@contextmanager
def two_networks(folder: Path, count: int = 2) -> Iterator[Hosts]:
    """Raises LabError where namespaces cannot be made."""
    inside = Inside.open(new_name())
    try:
        names = [f"host{host}" for host in range(count)]
        lines = "".join(f"{alone(host)} {name}\n" for host, name in enumerate(names))
        spaces = inside.ask("make_hosts", names=names, hosts_file=lines)
        inside.ask("run", commands=[(None, ["ip", *words.split()]) for words in _switches(count)])
        for host in range(count):
            commands = [(None, words) for words in _cables(host, spaces[str(host)])]
            commands += [(host, words) for words in _interfaces(host)]
            inside.ask("run", commands=[(where, ["ip", *words.split()]) for where, words in commands])
        yield Hosts(inside, folder, count)
    finally:
        inside.close()


def _switches(count: int) -> Iterator[str]:
    for name in ("joined", *(f"alone{host}" for host in range(count))):
        yield f"link add {name} type bridge stp_state 0 forward_delay 0"
        yield f"link set {name} up"


def _cables(host: int, space: str) -> Iterator[str]:
    for port, end, switch in ((f"a{host}", "eth0", f"alone{host}"), (f"b{host}", "eth1", "joined")):
        yield f"link add {port} type veth peer name {end} netns {space}"
        yield f"link set {port} master {switch} up"


def _interfaces(host: int) -> Iterator[str]:
    yield "link set lo up"
    for name, address in (("eth0", alone(host)), ("eth1", joined(host))):
        yield f"address add {address}/24 dev {name}"
        yield f"link set {name} up"
