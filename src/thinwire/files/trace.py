"""Traces: what took place on which lane of which rank, as a file for Perfetto or chrome://tracing.

The Chrome trace event format, complete events ("ph": "X") with times in microseconds; a process is a rank, a thread is a
lane. Simulated and real steps have the same form, so that both can be opened side by side.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPUTE = "compute"
"""The lane of what is not communication."""
STEPS = "steps"
"""The lane that says which step it was, in traces of several."""


@dataclass(frozen=True)
class Span:
    """Something that took place: for traces."""

    rank: int
    lane: str
    name: str
    start_s: float
    end_s: float


def trace_events(spans: Sequence[Span], ranks: Mapping[int, str]) -> list[dict[str, Any]]:
    """Events of the trace: names of ranks and lanes, then what took place."""
    lanes: dict[tuple[int, str], int] = {}
    for span in spans:
        lanes.setdefault((span.rank, span.lane), len(lanes))
    names = [_named("process_name", rank, 0, ranks[rank]) for rank in sorted({rank for rank, _ in lanes})]
    names += [_named("thread_name", rank, thread, lane) for (rank, lane), thread in lanes.items()]
    return names + [_complete(span, lanes[span.rank, span.lane]) for span in spans]


def _named(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _complete(span: Span, thread: int) -> dict[str, Any]:
    return {
        "name": span.name, "cat": COMPUTE if span.lane == COMPUTE else "wire", "ph": "X", "pid": span.rank,
        "tid": thread, "ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6,
    }  # fmt: skip


def trace_text(spans: Sequence[Span], ranks: Mapping[int, str]) -> str:
    """What the trace file holds; `ranks` has a name for every rank."""
    return json.dumps({"traceEvents": trace_events(spans, ranks), "displayTimeUnit": "ms"}) + "\n"


def read_trace(path: Path) -> list[Span]:
    """The spans of a file of `trace_text`. Raises OSError, or ValueError if it is none."""
    raw = path.read_bytes()
    try:
        events = json.loads(raw)["traceEvents"]
        lanes = {(e["pid"], e["tid"]): str(e["args"]["name"]) for e in events if e["name"] == "thread_name"}
        return [
            Span(int(e["pid"]), lanes[e["pid"], e["tid"]], str(e["name"]), e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
            for e in events
            if e["ph"] == "X"
        ]
    except KeyError as error:
        raise ValueError(f"{path} is no trace of thinwire: it lacks {error}") from None
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ValueError(f"{path} is no trace of thinwire: what it holds cannot be read") from None
