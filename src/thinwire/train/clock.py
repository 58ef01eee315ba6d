"""Where the seconds of a step went: summed by cause, and of a few steps moment by moment in a trace.

On a CPU a lap is wall-clock time. On an accelerator work is queued, so a lap is the time between two events in the
device's own stream, read once at the end of the step. Time blocked on communication is measured by the ledger and taken
out of the lap it fell into, so that the causes add up to the step.

A trace has the form of the simulator's. Compute streams are the laps of rank 0; a stream of a link has the collectives
of one level and kind, one after the other as their communicator carries them, each until it was waited for (backends do
not tell when the last byte came).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from thinwire.comm.ledger import Entry
from thinwire.files.folders import write_atomic
from thinwire.files.trace import COMPUTE, STEPS, Span, trace_text
from thinwire.units import SYSTEM_CLOCK, SystemClock, show_bytes

Cause = Literal["data", "forward", "backward", "comm", "optimizer", "sync", "checkpoint", "eval", "other"]
CAUSES: tuple[Cause, ...] = ("data", "forward", "backward", "comm", "optimizer", "sync", "checkpoint", "eval", "other")


@dataclass(frozen=True)
class Lap:
    """What some of a step was spent on; times are those of the clock."""

    cause: Cause
    start_s: float
    end_s: float


class StepClock:
    """`start()`, then `lap(cause)` after each part, then `stop()` gives seconds by cause, and `laps` each part."""

    def __init__(self, device: torch.device, clock: SystemClock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Cause, float, torch.cuda.Event | None]] = []
        self.laps: list[Lap] = []

    def start(self) -> None:
        self._marks = [("other", self._clock.now(), self._event())]

    def lap(self, cause: Cause) -> None:
        """The time since the last mark was spent on `cause`."""
        self._marks.append((cause, self._clock.now(), self._event()))

    def stop(self, *, exposed_comm_s: float) -> dict[str, float]:
        """Seconds by cause. `exposed_comm_s` of them, spent inside backward or comm laps, are shown as `comm`."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(CAUSES, 0.0)
        self.laps = self._measured()
        for lap in self.laps:
            seconds[lap.cause] += lap.end_s - lap.start_s
        hidden_in_others = max(0.0, exposed_comm_s - seconds["comm"])
        for cause in ("backward", "forward", "optimizer"):
            moved = min(seconds[cause], hidden_in_others)
            seconds[cause] -= moved
            seconds["comm"] += moved
            hidden_in_others -= moved
        return {cause: round(value, 6) for cause, value in seconds.items()}

    def _measured(self) -> list[Lap]:
        laps, end_s = list[Lap](), self._marks[0][1]
        for (_, _, event_before), (cause, after_s, event_after) in zip(self._marks, self._marks[1:], strict=False):
            start_s = end_s
            if event_before is not None and event_after is not None:
                end_s = start_s + event_before.elapsed_time(event_after) / 1e3
            else:
                end_s = after_s
            laps.append(Lap(cause, start_s, end_s))
        return laps

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


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
            write_atomic(self._path, trace_text(moved, {0: "rank 0"}))
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
