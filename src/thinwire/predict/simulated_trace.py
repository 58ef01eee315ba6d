"""A simulated step as people see it: a trace file, and lines of text for a terminal."""

from pathlib import Path

from thinwire.files.folders import write_asked
from thinwire.files.trace import Span, trace_text
from thinwire.predict.simulate import Simulated


def write_trace(simulated: Simulated, path: Path) -> None:
    """Write the trace file, whole or not at all. Raises ConfigError."""
    write_asked(path, trace_text(simulated.spans, dict(enumerate(simulated.ranks))), option="--trace")


_SIGNS = {"forward": "F", "backward": "B", "optimizer": "O", "gather": "g", "reduce": "r", "refresh": "w", "send": "s"}


def timeline(simulated: Simulated, *, width: int = 100, rows: int = 24) -> list[str]:
    """A line for each lane that was used: the sign of what filled most of each column, or a dot."""
    end = max((span.end_s for span in simulated.spans), default=0.0)
    if end == 0:
        return []
    by_lane: dict[tuple[int, str], list[Span]] = {}
    for span in simulated.spans:
        by_lane.setdefault((span.rank, span.lane), []).append(span)
    names = {
        key: f"{simulated.ranks[key[0]]} {key[1]}"
        for key in sorted(by_lane, key=lambda key: (key[0], key[1] != "compute"))
    }
    drawn = {key: _row(by_lane[key], end, width) for key in names}
    used = [key for key in names if drawn[key].strip(".")]
    indent = max(len(names[key]) for key in used)
    lines = [f"{names[key]:<{indent}} |{drawn[key]}|" for key in used[:rows]]
    if len(used) > rows:
        lines.append(f"({len(used) - rows} more lanes)")
    return [
        *lines,
        "F forward  B backward  O optimizer  g gather  r reduce  w new weights  s send between stages  . idle",
    ]


def _row(spans: list[Span], end: float, width: int) -> str:
    filled: list[dict[str, float]] = [{} for _ in range(width)]
    for span in spans:
        sign = _SIGNS.get(span.name.split()[0], "?")
        first, last = span.start_s / end * width, span.end_s / end * width
        for column in range(int(first), min(width - 1, int(last)) + 1):
            share = min(last, column + 1) - max(first, column)
            filled[column][sign] = filled[column].get(sign, 0.0) + share
    return "".join(_most(column) for column in filled)


def _most(column: dict[str, float]) -> str:
    sign = max(column, key=lambda key: column[key], default=".")
    return sign if column and sum(column.values()) >= 0.25 else "."
