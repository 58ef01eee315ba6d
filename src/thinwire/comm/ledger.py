"""The bytes and seconds of every collective, by level. Bytes are counted where they are sent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Entry:
    """One collective of this rank.

    Times are `time.perf_counter()` seconds: `queued_s` when it was asked for, `started_s` when the backend had taken it
    over, `finished_s` when it had been waited for (backends do not tell when the last byte came).
    """

    level: str
    kind: str
    purpose: str
    payload_bytes: int
    """Size of the whole logical tensor the collective is about, before any codec."""
    sent_bytes: int
    """What this rank puts on the level's links: V (k-1)/k of the coded tensor for a gather or a reduce-scatter."""
    codec: str
    queued_s: float
    started_s: float = 0.0
    finished_s: float = 0.0
    exposed_s: float = 0.0
    """Seconds for which this rank stood still because of it."""


@dataclass(frozen=True)
class StepWire:
    """What a step's collectives were."""

    entries: tuple[Entry, ...]

    def sent_bytes(self) -> dict[str, dict[str, int]]:
        """level -> purpose -> bytes sent by this rank."""
        sums: dict[str, dict[str, int]] = {}
        for entry in self.entries:
            of_level = sums.setdefault(entry.level, {})
            of_level[entry.purpose] = of_level.get(entry.purpose, 0) + entry.sent_bytes
        return sums

    @property
    def exposed_s(self) -> float:
        """Seconds for which compute stood still for the step's own communication, outer rounds not counted."""
        return sum(entry.exposed_s for entry in self.entries if not entry.purpose.startswith("outer-"))


@dataclass
class Ledger:
    """Collects entries; `drain()` hands them over and starts anew."""

    _entries: list[Entry] = field(default_factory=list)

    def open(self, *, level: str, kind: str, purpose: str, payload_bytes: int, sent_bytes: int, codec: str) -> Entry:
        """Record a collective that is being issued now."""
        entry = Entry(level, kind, purpose, payload_bytes, sent_bytes, codec, queued_s=time.perf_counter())
        self._entries.append(entry)
        return entry

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is issued inside (a validation) is no part of any step, and is forgotten."""
        kept = self._entries
        self._entries = []
        try:
            yield
        finally:
            self._entries = kept

    def drain(self) -> StepWire:
        """Everything since the last drain."""
        entries, self._entries = tuple(self._entries), []
        return StepWire(entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)
