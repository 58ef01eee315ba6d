"""A collective in flight. It is waited for exactly once; one that is dropped is found when the world is left."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from torch import Tensor

from thinwire.comm.ledger import Entry
from thinwire.comm.status import Status
from thinwire.comm.transport.transport import Waitable
from thinwire.errors import LinkError, UseError


class Closable(Protocol):
    def close(self) -> None: ...


class Accounts(Protocol):
    """How failures are accounted for among all ranks of a world: `thinwire.comm.lost.Peers`."""

    def explain(self, error: Exception) -> Exception: ...

    def tell_diverged(self, error: UseError) -> None: ...


class Outstanding(set["Handle"]):
    """The handles of one rank that nobody has waited for yet, and what others are told while one is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.status = Status()
        self.accounts: Accounts | None = None
        self.same_host: list[Closable] = []
        """Transports between ranks of this host."""
        self.broken = False

    def give_up(self) -> None:
        """Ranks have lost each other: nothing that is outstanding comes any more; who waits on this host hears of it."""
        self.broken = True
        self.clear()
        for transport in self.same_host:
            transport.close()

    def raise_diverged(self, sentence: str) -> NoReturn:
        """This rank has found ranks in different collectives: raises UseError here, and on all that wait for others."""
        error = UseError(sentence)
        if self.accounts is not None:
            self.accounts.tell_diverged(error)
        self.give_up()
        raise error from None

    @contextmanager
    def waiting(self, awaited: Entry | str) -> Iterator[None]:
        """Others are waited for inside. Raises RankLost, naming the one that has not come, if a connection fails."""
        self.status.wait(awaited)
        with self.issuing():
            yield
        self.status.waited()

    @contextmanager
    def issuing(self) -> Iterator[None]:
        """Something is sent to others inside. Raises RankLost, naming the one that is gone, if a connection fails."""
        try:
            yield
        except (RuntimeError, LinkError) as error:
            self.fail(error)

    def fail(self, error: Exception) -> NoReturn:
        """Raise `error`, or what explains it."""
        self.give_up()
        if (found := self.explain(error)) is error:
            raise error
        raise found from None

    def explain(self, error: Exception) -> Exception:
        """What to raise in the place of `error`, see `Peers.explain`."""
        return error if self.accounts is None else self.accounts.explain(error)


class Handle:
    """Wait for `works`, then run `finish` (decode, sum). Holds references to `keep` until then.

    Nothing is done in callbacks: `finish` runs in the thread that waits, so all ranks do the same in the same order.
    """

    def __init__(
        self,
        outstanding: Outstanding,
        entry: Entry | None,
        works: Sequence[Waitable],
        *,
        finish: Callable[[], None] | None = None,
        keep: Sequence[Tensor] = (),
        beside: Sequence[Entry] = (),
    ) -> None:
        """`beside`: entries of the same works on other levels' links; the time stood still is `entry`'s alone."""
        self._outstanding, self._entry, self._works, self._beside = outstanding, entry, list(works), tuple(beside)
        self._finish, self._keep = finish, tuple(keep)
        self._waited = False
        for each in self._entries:
            each.started_s = time.perf_counter()
        outstanding.add(self)

    @property
    def _entries(self) -> list[Entry]:
        return [each for each in (self._entry, *self._beside) if each is not None]

    @property
    def level(self) -> str | None:
        """Name of the level whose links carry it; None if nothing is sent."""
        return None if self._entry is None else self._entry.level

    def wait(self) -> float:
        """Block until the result is in place; seconds until it came, without what `finish` makes of it.

        Raises RankLost if another rank does not come. Calling it twice is a bug, and raises AssertionError.
        """
        assert not self._waited, f"handle waited for twice: {self._entry}"
        start_s = time.perf_counter()
        self._outstanding.status.wait(self._entry or "a collective")
        try:
            for work in self._works:
                work.wait()
        except (RuntimeError, LinkError) as error:
            self._outstanding.fail(error)
        self._outstanding.status.waited()
        now_s = time.perf_counter()
        waited_s = now_s - start_s
        for each in self._entries:
            each.finished_s = now_s
        if self._entry is not None:
            self._entry.exposed_s += waited_s
        if self._finish is not None:
            self._finish()
        self._waited = True
        self._outstanding.discard(self)
        self._works, self._keep, self._finish = [], (), None
        return waited_s

    def __repr__(self) -> str:
        return f"Handle({self._entry})"


class InFlight:
    """Drives collectives of several hops side by side: each is an iterator that yields the handle of a hop it has issued.

    To start issues the first hop of each, always from one thread.
    """

    def __init__(self, *hops: Iterator[Any]) -> None:
        self._under_way = self._issued(hops)

    @property
    def finished(self) -> bool:
        return not self._under_way

    @property
    def levels(self) -> set[str]:
        """Names of the levels whose links the hops in flight are on."""
        return {handle.level for _, handle in self._under_way if handle.level is not None}

    def advance(self) -> float:
        """Wait for the hop in flight of every collective and issue its next one, if there is one; seconds waited."""
        going_on, waited_s = [], 0.0
        for hops, handle in self._under_way:
            waited_s += handle.wait()
            going_on += self._issued(hops)
        self._under_way = going_on
        return waited_s

    def finish(self) -> float:
        """Advance to the end; seconds waited."""
        waited_s = 0.0
        while not self.finished:
            waited_s += self.advance()
        return waited_s

    def _issued(self, collectives: Sequence[Iterator[Any]]) -> list[tuple[Sequence[Iterator[Any]], Handle]]:
        """Those that have a next hop, with it; together what travels as one message."""
        return [((hops,), handle) for hops in collectives if (handle := next(hops, None)) is not None]
