"""Where the seconds of a step went, by cause.

On a CPU a lap is wall-clock time. On an accelerator work is queued, so a lap is the time between two events in the
device's own stream, read once at the end of the step. Time blocked on communication is measured by the ledger and taken
out of the lap it fell into, so that the causes add up to the step.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from thinwire.units import CLOCK, Clock

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

    def __init__(self, device: torch.device, clock: Clock = CLOCK) -> None:
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
