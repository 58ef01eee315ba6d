"""How ranks find each other: a store at rank 0, what each is about to do, and the addresses at which all are reached.

One rank of each host calls all other hosts at the first of the ways to them (`thinwire.comm.interfaces`). An address that
somebody cannot reach gives way to the host's next one, on all ranks alike. Waiting is done in short steps, so that a stop
that was asked for, or a failure that another rank has told, ends it at once on every rank.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from thinwire.comm.interfaces import Presence, Route, addresses, advice, leaders, listed, possible_routes
from thinwire.comm.status import StatusServer, call
from thinwire.config import differences
from thinwire.errors import ConfigError, LinkError, StopAsked, ThinwireError
from thinwire.units import SYSTEM_CLOCK, SystemClock

_LOOK_S, _OPEN_S, _CONNECT_S, _READ_S = 0.05, 3.0, 3.0, 2.0
_CALLERS = 32
_TELL_S = 15.0
"""For rank 0 to come, when this rank will not: both were started at about the same time."""
_SHOWN, _BRIEF = 4, 60
"""Of two ranks' runs: so many differences are told, and so much of each value."""
_FAILURE, _HEARD = "thinwire/failure", "thinwire/heard"
_KINDS: dict[str, type[ThinwireError]] = {"config": ConfigError, "link": LinkError, "stop": StopAsked}


class Rendezvous:
    """One rank's way to the others, until a time limit. Every rank makes it and calls its methods in the same order."""

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        *,
        timeout_s: float,
        stopped: Callable[[], bool],
        clock: SystemClock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._rank, self._size, self._host, self._port = rank, size, host, port
        self._timeout_s, self._end_s, self._stopped = timeout_s, clock.now() + timeout_s, stopped
        self._store: dist.TCPStore | None = None
        self._shared = ""

    @property
    def store(self) -> dist.TCPStore:
        assert self._store is not None, "the store is not open yet"
        return self._store

    def open(self) -> tuple[str, str] | None:
        """Open the store, at rank 0; the addresses of both ends of the connection to it, on the others.

        Raises LinkError, naming the address from which rank 0 was not reached in time, and StopAsked.
        """
        ends = None if self._rank == 0 else self._reach_rank_0()
        opened: list[dist.TCPStore | Exception] = []
        # In a thread: what answers at that port and is no store keeps a client waiting for ever.
        thread = threading.Thread(
            target=self._open_at, args=("127.0.0.1" if ends is None else ends[1], opened), daemon=True
        )
        thread.start()
        while thread.is_alive() and self._clock.now() < self._end_s and not self._stopped():
            thread.join(_LOOK_S)
        if thread.is_alive() and self._stopped():
            thread.join(_OPEN_S)  # once it is open, the stop can be told to the others
            if not opened:
                self._leave_if_asked()
        if not opened or isinstance(opened[0], Exception):
            why = "no rank 0 of a run answers there"
            if self._rank == 0:
                why = f"it cannot listen there: {_reason(opened[0]) if opened else 'no answer'}"
            raise LinkError(f"rank {self._rank} could not meet the others at {self._where}: {why}; choose another port")
        self._store = opened[0]
        return ends

    def _open_at(self, host: str, opened: "list[dist.TCPStore | Exception]") -> None:
        timeout, first = timedelta(seconds=self._timeout_s), self._rank == 0
        try:
            opened.append(
                dist.TCPStore(host, self._port, self._size, is_master=first, timeout=timeout, wait_for_workers=False)
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            opened.append(error)

    def agree(self, statement: Mapping[str, Any]) -> None:
        """Compare what this rank is about to do, as JSON, with what the others are.

        Raises ConfigError, with one sentence on every rank, if they differ: the first rank that has something else than
        rank 0, and what. LinkError if another process has this one's number.
        """
        text, token = json.dumps(statement, sort_keys=True), secrets.token_hex(8)
        told = self._share("run", [self._size, hashlib.sha256(text.encode()).hexdigest(), token])
        sizes = {rank: size for rank, (size, *_) in enumerate(told)} | {self._rank: self._size}
        if stray := [rank for rank, size in sizes.items() if size != told[0][0]]:
            self._end_all(
                f"rank {stray[0]} was started as one of {sizes[stray[0]]} ranks, rank 0 at {self._where} as one of "
                f"{told[0][0]}; start all of them with the same number"
            )
        if told[self._rank][2] != token:
            raise LinkError(
                f"another process came to {self._where} as rank {self._rank} too; give each process a rank of its own, or, "
                f"if these are two runs, ports of their own"
            )
        if odd := [rank for rank, (_, digest, _) in enumerate(told) if digest != told[0][1]]:
            self._disagree(statement, odd)

    def _disagree(self, statement: Mapping[str, Any], odd: Sequence[int]) -> NoReturn:
        """Ranks 0 and the first odd one say all that they have, so that every rank can say what differs."""
        shown = self._rank in (0, odd[0])
        said = self._share("runs", [socket.gethostname(), dict(statement)] if shown else None)
        (_, first), (host, other) = said[0], said[odd[0]]
        found = differences(first, other)
        words = [f"{key} is {_brief(there)} there and {_brief(here)} on rank 0" for key, here, there in found[:_SHOWN]]
        more = f" and {len(found) - _SHOWN} keys more" if len(found) > _SHOWN else ""
        beside = f", like {len(odd) - 1} other rank{'s' * (len(odd) > 2)}," if len(odd) > 1 else ""
        self._end_all(
            f"rank {odd[0]} (host {host}){beside} does not have rank 0's run: {'; '.join(words)}{more}; give every rank the "
            f"same run file, settings and corpus"
        )

    def _end_all(self, sentence: str) -> NoReturn:
        """Raise ConfigError where every rank does so by itself, rank 0 once the others need its store no more."""
        if self._rank == 0:
            self.fail("config", sentence)
        self.store.add(_HEARD, 1)
        raise ConfigError(sentence)

    def present(self, presence: Presence, server: StatusServer) -> tuple[Presence, ...]:
        """Everybody, with the addresses at which each is reached by all. Raises LinkError naming who is not."""
        told = self._share("present", {**asdict(presence), "token": secrets.token_hex(8)})
        server.token = told[0]["token"]
        self._share("ready", None)  # every server knows the token before anybody calls
        everyone = [Presence.read({key: value for key, value in each.items() if key != "token"}) for each in told]
        routes = possible_routes(everyone)
        if empty := [each for each, of_rank in zip(everyone, routes, strict=True) if not of_rank]:
            self.fail("link", f"{empty[0].who} has no address beside {listed(empty[0].here)}; plug in a network")
        decided = self._choose(everyone, routes, server.token)
        return tuple(replace(each, route=route) for each, route in zip(everyone, decided, strict=True))

    def fail(self, kind: str, sentence: str) -> NoReturn:
        """Tell all ranks, then raise what `kind` (`config`, `link`, `stop`) stands for."""
        if self._store is not None:
            self._store.set(_FAILURE, json.dumps([kind, sentence]))
            if self._rank == 0:  # the store goes with this process: let the others read it
                end_s = self._clock.now() + _READ_S
                while self._store.add(_HEARD, 0) < self._size - 1 and self._clock.now() < end_s:
                    self._clock.sleep(_LOOK_S)
        raise _KINDS[kind](sentence)

    def _reach_rank_0(self) -> tuple[str, str]:
        """Connect to rank 0, again and again until it is there."""
        why = "nobody answers"
        while (left_s := self._end_s - self._clock.now()) > 0:
            try:
                with socket.create_connection((self._host, self._port), min(1.0, left_s)) as line:
                    return str(line.getsockname()[0]), str(line.getpeername()[0])
            except OSError as error:
                why = error.strerror or str(error)
            self._leave_if_asked()  # there is nobody to tell
            self._clock.sleep(min(_LOOK_S, left_s))
        raise LinkError(
            f"rank {self._rank} (host {socket.gethostname()}) could not reach rank 0 at {self._where}{self._leaving()} "
            f"in {self._timeout_s:g} s: {why}; is rank 0 running there, and does that address lead to it?"
        )

    def _leaving(self) -> str:
        """By which of this machine's addresses the way to rank 0 begins, as far as routes tell."""
        try:
            family, kind, _, _, target = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as line:
                line.connect(target)
                ip = line.getsockname()[0]
        except OSError:
            return ""
        return "".join(f" from {address}" for address in addresses() if address.ip == ip)

    @property
    def _where(self) -> str:
        return f"{self._host}:{self._port}"

    def _leave_if_asked(self) -> None:
        if self._stopped():
            self.fail("stop", "stopped before the ranks had met; the same command starts again")

    def _share(self, name: str, mine: Any) -> list[Any]:
        """What every rank gives, by rank. Raises what another rank has told instead."""
        try:
            self._shared = f"thinwire/{name}"
            self.store.set(f"{self._shared}/{self._rank}", json.dumps(mine))
            if self._rank == 0:
                keys = [f"{self._shared}/{rank}" for rank in range(self._size)]
                for key in keys:
                    self._await(key)
                told = [json.loads(each) for each in self.store.multi_get(keys)]
                self.store.set(self._shared, json.dumps(told))
                return told
            self._await(self._shared)
            everything: list[Any] = json.loads(self.store.get(self._shared))
            return everything
        except (dist.DistError, RuntimeError) as error:
            raise LinkError(
                f"rank {self._rank} (host {socket.gethostname()}) lost rank 0 at {self._where} while the ranks met: it "
                "has ended, or its network has"
            ) from error

    def _await(self, key: str) -> None:
        wait_s = _LOOK_S / 10
        while not self.store.check([key]):
            self._leave_if_asked()
            if self.store.check([_FAILURE]):
                kind, sentence = json.loads(self.store.get(_FAILURE))
                self.store.add(_HEARD, 1)
                raise _KINDS[kind](sentence)
            if self._clock.now() > self._end_s:
                self.fail("link", self._missing())
            self._clock.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _LOOK_S)

    def _missing(self) -> str:
        late = [rank for rank in range(self._size) if not self.store.check([f"{self._shared}/{rank}"])] or [0]
        ranks = f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late[:8]))}{', ...' * (len(late) > 8)}"
        return (
            f"{ranks} of {self._size} did not come to rank 0 at {self._where} within {self._timeout_s:g} s; did they "
            "start, and does that address lead from their hosts to rank 0?"
        )

    def _choose(self, everyone: Sequence[Presence], routes: Sequence[Sequence[Route]], token: str) -> list[Route]:
        """Of the routes of every rank, in order of preference, the first that all reach. Raises LinkError."""
        first = leaders(everyone, routes)
        at, failures = dict.fromkeys(set(first), 0), dict[int, list[str]]()
        for attempt in range(sum(len(routes[leader]) for leader in at) if len(at) > 1 else 0):
            current = {leader: routes[leader][choice] for leader, choice in at.items()}
            mine = self._call_all(everyone, current, token) if self._rank in at else {}
            reasons = self._share(f"reached-{attempt}", mine)
            lost = {int(leader) for of_rank in reasons for leader in of_rank}
            for caller, of_rank in enumerate(reasons):
                for leader, why in of_rank.items():
                    failures.setdefault(int(leader), []).append(
                        f"{everyone[caller].who} over {listed(current[caller])} cannot reach "
                        f"{everyone[int(leader)].who} at {listed(current[int(leader)])}: {why}"
                    )
            if not lost:
                break
            for leader in sorted(lost):
                at[leader] += 1
                if at[leader] == len(routes[leader]):
                    self.fail("link", f"{failures[leader][0]}; {advice(everyone[leader], routes[leader])}")
        return [routes[rank][at[leader]] for rank, leader in enumerate(first)]

    def _call_all(self, everyone: Sequence[Presence], current: Mapping[int, Route], token: str) -> dict[int, str]:
        """Who is not reached, and why."""
        targets = [
            (leader, address.ip) for leader, route in current.items() if leader != self._rank for address in route
        ]

        def reach(target: tuple[int, str]) -> str | None:
            leader, ip = target
            try:
                there = call(ip, everyone[leader].port, {"token": token}, min(_CONNECT_S, self._timeout_s / 4))
            except OSError as error:
                return error.strerror or str(error)
            return None if there["rank"] == leader else f"rank {there['rank']} answers there"

        with ThreadPoolExecutor(_CALLERS) as pool:
            answers = list(pool.map(reach, targets))
        return {leader: why for (leader, _), why in zip(targets, answers, strict=True) if why is not None}


def tell_rank_0(rank: int, size: int, host: str, port: int, sentence: str) -> None:
    """Tell the others, if rank 0 comes within seconds, why this rank will not come: they would wait for it."""
    meeting = Rendezvous(rank, size, host, port, timeout_s=_TELL_S, stopped=lambda: False)
    with suppress(ThinwireError):
        meeting.open()
        meeting.fail("config", f"rank {rank} (host {socket.gethostname()}): {sentence}")


def _brief(value: object) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def _reason(error: object) -> str:
    """The system's word for what torch's store calls by the name of the error's number."""
    named = re.search(r"name: (E[A-Z]+)", str(error))
    return os.strerror(getattr(errno, named[1])) if named and hasattr(errno, named[1]) else type(error).__name__
