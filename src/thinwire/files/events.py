"""`events.jsonl`: what a run says for programs, one JSON object a line, `event` names its kind.

The file is append-only. A resumed run appends: for a step that stands there twice, the later line counts. A last line that
was cut short, by a kill or a power cut, is dropped by whoever reads or appends next.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinwire.errors import ConfigError

_WAITING_MOST = 10_000
_TAIL_BYTES = 1 << 16


class EventLog:
    """Appends records to `path`; every line is written at once, so a killed run keeps all it said.

    What cannot be written (the disk is full) waits in memory, in order, until it can; `refused` says why. Raises
    ConfigError if `path` cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.refused: str | None = None
        """What the system said when it last took no record; None: it took all."""
        self.lost = 0
        """Records that waited until there were too many."""
        self._waiting: deque[bytes] = deque()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._end = _whole_bytes(self._descriptor)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}; make it writable") from None

    @property
    def waiting(self) -> int:
        """Records that are not written yet."""
        return len(self._waiting)

    def write(self, event: str, **fields: Any) -> None:
        """Append one record. Non-finite floats are written as the strings `"nan"`, `"inf"`, `"-inf"`: valid JSON."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self._waiting.append(json.dumps(_finite(record), separators=(",", ":")).encode() + b"\n")
        if len(self._waiting) > _WAITING_MOST:
            self._waiting.popleft()
            self.lost += 1
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
            self.refused = None
        except OSError as error:
            self.refused = error.strerror or str(error)

    def close(self) -> None:
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        """All of `line`, or none of it: what there was room for is cut off again, now or before the next."""
        if os.fstat(self._descriptor).st_size != self._end:
            os.ftruncate(self._descriptor, self._end)
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _whole_bytes(descriptor: int) -> int:
    """Where the last whole record ends."""
    end = os.fstat(descriptor).st_size
    while end:
        length, begin = 0, 0
        while length < end and begin == 0:  # back to where the last line begins
            length = min(end, length + _TAIL_BYTES)
            tail = os.pread(descriptor, length, end - length)
            begin = tail.rfind(b"\n", 0, len(tail) - 1) + 1
        if _record(tail[begin:]) is not None:
            return end
        end -= len(tail) - begin
    return 0


def _record(line: bytes) -> dict[str, Any] | None:
    """None for what is no whole record."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def read_events(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of `path`, of kind `event` if given. A torn end is left out.

    Raises ValueError with the number of a line that is no record and has one behind it.
    """
    torn = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is None:
                torn = torn or number
                continue
            if torn is not None:
                raise ValueError(f"line {torn} is no record; remove that line")
            if event is None or record["event"] == event:
                yield record


def steps(path: Path) -> dict[int, dict[str, Any]]:
    """The `step` records by step number, the later of two for the same step."""
    return {record["step"]: record for record in read_events(path, "step")}
