"""What rank 0 did in a few steps, moment by moment, in the form of the simulator's traces.

Compute lanes are the laps of the step's clock; a wire lane has the collectives of one level and kind, one after the other
as their communicator carries them, each until it was waited for (backends do not tell when the last byte came).
"""

from collections.abc import Sequence
from pathlib import Path

from thinwire.comm.ledger import Entry
from thinwire.files.folders import write_whole
from thinwire.files.trace import COMPUTE, STEPS, Span, trace_text
from thinwire.train.clock import Lap
from thinwire.units import show_bytes

_WORDS = {"P-gather": "gather", "P-refresh": "refresh", "G-reduce": "reduce", "G-gather": "gather sums"}
_WAITING = ("comm", "other")


class Tracer:
    """Records `count` steps, the first of a start left out, and writes them to `path` one step later, or at the end."""

    def __init__(self, path: Path, *, first_step: int, count: int) -> None:
        self._path, self._count = path, count
        self._first = first_step + 2
        self._spans: list[Span] = []
        self._entries: list[Entry] = []
        self._seen = 0

    def step(self, number: int, laps: Sequence[Lap], entries: Sequence[Entry]) -> None:
        """Step `number` (1 is the first) is over. Raises OSError if the trace cannot be written."""
        if self._count == 0 or number < self._first:
            return
        self._entries += entries
        if self._seen < self._count:
            self._seen += 1
            self._spans.append(Span(0, STEPS, f"step {number}", laps[0].start_s, laps[-1].end_s))
            self._spans += [
                Span(0, COMPUTE, lap.cause, lap.start_s, lap.end_s) for lap in laps if lap.cause not in _WAITING
            ]
        else:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything. Raises OSError."""
        if self._spans:
            steps = [span for span in self._spans if span.lane == STEPS]
            spans = [*self._spans, *_on_the_wire(self._entries, steps[-1].end_s)]
            zero = steps[0].start_s
            moved = [Span(s.rank, s.lane, s.name, s.start_s - zero, s.end_s - zero) for s in spans]
            write_whole(self._path, trace_text(moved, {0: "rank 0"}))
        self._spans, self._entries, self._count = [], [], 0


def _on_the_wire(entries: Sequence[Entry], end_s: float) -> list[Span]:
    """What was issued before `end_s`, lane by lane without overlaps."""
    free_s: dict[str, float] = {}
    spans = []
    for entry in entries:
        if entry.queued_s >= end_s or not entry.finished_s or not entry.sent_bytes:
            continue
        lane = f"{entry.level} {entry.kind}"
        start_s = min(max(entry.queued_s, free_s.get(lane, 0.0)), entry.finished_s)
        free_s[lane] = max(entry.finished_s, free_s.get(lane, 0.0))
        codec = "" if entry.codec == "identity" else f" {entry.codec}"
        name = f"{_WORDS.get(entry.purpose, entry.purpose)} {show_bytes(entry.sent_bytes)}{codec}"
        spans.append(Span(0, lane, name, start_s, entry.finished_s))
    return spans
