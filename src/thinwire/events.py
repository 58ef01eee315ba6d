"""`events.jsonl`: what a run says for programs, one JSON object a line, `event` names its kind.

The file is append-only. A resumed run appends: for a step that stands there twice, the later line counts.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class EventLog:
    """Appends records to `path`; every line is flushed, so a killed run keeps all it said."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one record. Non-finite floats are written as the strings `"nan"`, `"inf"`, `"-inf"`: valid JSON."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(_finite(record), separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_events(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of `path`, of kind `event` if given. A torn last line (a killed run) is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            record = json.loads(line)
            if event is None or record["event"] == event:
                yield record


def steps(path: Path) -> dict[int, dict[str, Any]]:
    """The `step` records by step number, the later of two for the same step."""
    return {record["step"]: record for record in read_events(path, "step")}
