"""Faults as data: when one is due, and the step a run has reached, followed in its `events.jsonl`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from thinwire.lab.config import Fault
from thinwire.lab.shaping import show_limit


class StepWatch:
    """The highest step in the records that an event file gained since this watch began; None before the first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offset = path.stat().st_size if path is not None and path.exists() else 0
        self._torn = b""
        self.step: int | None = None

    def look(self) -> int | None:
        """Read what is new."""
        if self._path is None or not self._path.exists():
            return self.step
        if self._path.stat().st_size < self._offset:  # put aside and begun anew
            self._offset, self._torn = 0, b""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._torn = (self._torn + new).split(b"\n")
        for step in _steps(lines):
            self.step = step if self.step is None else max(self.step, step)
        return self.step


def _steps(lines: Sequence[bytes]) -> Iterator[int]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") == "step" and isinstance(record.get("step"), int):
            yield record["step"]


def what(fault: Fault) -> str:
    """`"rate of host 1 to 20 Mbit/s"`, `"freeze rank 3"`."""
    named = ((name, getattr(fault, name)) for name in ("host", "site", "rank"))
    target = " ".join(f"{name} {index}" for name, index in named if index is not None)
    if fault.kind == "rate":
        return f"rate of {target} to {show_limit(fault.rate)}"
    return f"{fault.kind.replace('_host', '')} {target}"


def due(faults: Sequence[Fault], *, elapsed_s: float, step: int | None) -> tuple[list[Fault], list[Fault]]:
    """`(those that are due, the rest)`, both in the order in which they were given; due ones of a time by that time."""
    now = [fault for fault in faults if _is_due(fault, elapsed_s, step)]
    later = [fault for fault in faults if not _is_due(fault, elapsed_s, step)]
    return sorted(now, key=lambda fault: fault.at_s or 0.0), later


def _is_due(fault: Fault, elapsed_s: float, step: int | None) -> bool:
    if fault.at_s is not None:
        return elapsed_s >= fault.at_s
    return step is not None and fault.at_step is not None and step >= fault.at_step
