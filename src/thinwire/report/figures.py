"""Figures as plotly documents (traces and layout): pure functions of runs and predictions. Colours suit dark and light.

The last one is a step, stream by stream: what rank 0 did, and below it the same step simulated.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from thinwire.files.trace import COMPUTE, STEPS, Span
from thinwire.report.read import Predicted, Run, number

Trace = dict[str, Any]
POINTS = 1500
"""Longer curves are drawn as the means of so many equal pieces."""
RUN_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e11d8f", "#8b5cf6", "#b58900", "#06b6d4", "#ef4444")
CAUSE_COLOURS = {
    "forward": "#3b82f6", "backward": "#6366f1", "forward and backward": "#4f73f4", "comm": "#f97316",
    "optimizer": "#10b981", "data": "#b58900", "checkpoint": "#e11d8f", "eval": "#06b6d4", "other": "#94a3b8",
}  # fmt: skip
AXES = {
    "steps": "steps", "tokens": "tokens", "seconds": "seconds of training",
    "bytes": "bytes rank 0 sent over the outermost level",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure with its heading; `name` is its id in the page."""

    name: str
    title: str
    traces: list[Trace]
    x_title: str
    y_title: str
    layout: Mapping[str, Any]


def loss_figures(runs: Sequence[Run]) -> list[Figure]:
    """Loss against steps, tokens, seconds and bytes; bytes only if a run sent any."""
    found = []
    for axis, title in AXES.items():
        shown = [(i, run) for i, run in enumerate(runs) if axis != "bytes" or run.thin_level is not None]
        shown = [(i, run) for i, run in shown if not run.emulated]
        traces = [trace for i, run in shown for trace in _loss_traces(run, axis, RUN_COLOURS[i % len(RUN_COLOURS)])]
        if traces:
            found.append(Figure(f"loss-{axis}", f"Loss against {title}", traces, title, "loss", {}))
    return found


def _loss_traces(run: Run, axis: str, colour: str) -> list[Trace]:
    along = run.along(axis)
    points = [(x, y) for x, record in zip(along, run.steps, strict=True) if (y := number(record["loss"])) is not None]
    xs, ys = thinned(points)
    line = {
        "type": "scatter", "mode": "lines", "name": run.name, "legendgroup": run.name, "x": xs, "y": ys,
        "line": {"color": colour, "width": 1.6},
    }  # fmt: skip
    place = {record["step"]: x for x, record in zip(along, run.steps, strict=True)} | {0: 0}
    held = [
        (place[record["step"]], loss)
        for record in run.evals
        if record["step"] in place and (loss := number(record["loss"])) is not None
    ]
    if not held:
        return [line]
    marks = {
        "type": "scatter", "mode": "markers", "name": f"{run.name}, validation", "legendgroup": run.name,
        "x": [x for x, _ in held], "y": [y for _, y in held], "marker": {"color": colour, "size": 9, "symbol": "diamond"},
    }  # fmt: skip
    return [line, marks]


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The curve itself, or at most POINTS points: last x and mean y of each piece."""
    size = -(-len(points) // POINTS)
    pieces = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [piece[-1][0] for piece in pieces], [fmean(y for _, y in piece) for piece in pieces]


def course_figure(run: Run) -> Figure:
    """Seconds of every step by cause, stacked."""
    causes = [cause for cause, seconds in run.seconds.items() if seconds > 0]
    traces = []
    for cause in causes:
        xs, ys = thinned([(record["step"], record["seconds"].get(cause, 0.0)) for record in run.steps])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "seconds",
                "name": cause,
                "x": xs,
                "y": ys,
                "line": {"width": 0.5, "color": CAUSE_COLOURS.get(cause, "#94a3b8")},
            }
        )
    return Figure(f"course-{run.name}", f"{run.name}: seconds of every step by cause", traces, "steps", "seconds", {})


def merged(seconds: Mapping[str, float]) -> dict[str, float]:
    """Measured causes as a prediction knows them: forward and backward are one."""
    found: dict[str, float] = {}
    for cause, value in seconds.items():
        name = "forward and backward" if cause in ("forward", "backward") else cause
        found[name] = found.get(name, 0.0) + value
    return found


def said(predicted: Predicted) -> dict[str, float]:
    """A prediction by the causes of `merged`: all that waits for others is `comm`."""
    time = predicted.time
    comm = time.total - time.compute_s - time.optimizer_s
    return {"forward and backward": time.compute_s, "comm": comm, "optimizer": time.optimizer_s}


def time_figure(runs: Sequence[Run], predictions: Sequence[Predicted | str]) -> Figure:
    """Mean seconds of a step by cause: each run's bar, and its prediction's beside it."""
    bars: list[tuple[str, dict[str, float]]] = []
    for run, predicted in zip(runs, predictions, strict=True):
        bars.append((f"{run.name}<br>measured", merged(run.seconds)))
        if not isinstance(predicted, str):
            bars.append((f"{run.name}<br>predicted", said(predicted)))
    causes = [cause for cause in CAUSE_COLOURS if any(bar.get(cause, 0) > 0 for _, bar in bars)]
    traces = [
        {
            "type": "bar",
            "name": cause,
            "x": [name for name, _ in bars],
            "y": [bar.get(cause, 0.0) for _, bar in bars],
            "marker": {"color": CAUSE_COLOURS[cause]},
        }
        for cause in causes
    ]
    title = "Mean seconds of a step by cause, predicted beside measured"
    return Figure("time", title, traces, "", "seconds", {"barmode": "stack"})


def wire_figure(run: Run) -> Figure | None:
    """Bytes of a step by level and purpose, predicted beside measured; None for a run that sends nothing."""
    rows = wire_rows(run)
    if not rows:
        return None
    names = [f"{level}<br>{purpose}" for level, purpose, _, _ in rows]
    traces: list[Trace] = [
        {"type": "bar", "name": "predicted", "x": names, "y": [row[2] for row in rows], "marker": {"color": "#94a3b8"}},
        {"type": "bar", "name": "measured", "x": names, "y": [row[3] for row in rows], "marker": {"color": "#3b82f6"}},
    ]
    title = f"{run.name}: bytes that rank 0 sends in a step, by level"
    return Figure(f"wire-{run.name}", title, traces, "", "bytes", {"barmode": "group"})


def wire_rows(run: Run) -> list[tuple[str, str, float | None, float]]:
    """(level, purpose, predicted bytes or None, mean measured bytes), inner level first."""
    predicted = run.start.get("wire_predicted", {})
    return [
        (level, purpose, predicted.get(level, {}).get(purpose), run.wire.get(level, {}).get(purpose, 0.0))
        for level in run.cluster.level_names
        for purpose in dict.fromkeys([*predicted.get(level, {}), *run.wire.get(level, {})])
    ]


MEMORY = ("params", "grads", "optimizer", "residual", "gathered", "activations", "live", "framework")
MEMORY_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#eab308", "#8b5cf6", "#e11d8f", "#06b6d4", "#94a3b8")


STATES = MEMORY[:3]


def memory_figures(runs: Sequence[Run], predictions: Sequence[Predicted | str]) -> list[Figure]:
    """Bytes on rank 0: the states that were held beside their prediction, and all that is predicted; what there is."""
    held: list[tuple[str, Mapping[str, float]]] = []
    everything: list[tuple[str, Mapping[str, float]]] = []
    for run, predicted in zip(runs, predictions, strict=True):
        if not isinstance(predicted, str):
            expected = {name: getattr(predicted.memory, name) for name in MEMORY}
            held.append((f"{run.name}<br>predicted", expected))
            everything.append((run.name, expected))
        if run.start.get("held"):
            held.append((f"{run.name}<br>held", run.start["held"]))
    drawn = (
        ("memory-states", "States on rank 0, predicted beside held", _stack(held, STATES)),
        ("memory-all", "All memory predicted, by cause", _stack(everything, MEMORY)),
    )
    return [Figure(name, title, traces, "", "bytes", {"barmode": "stack"}) for name, title, traces in drawn if traces]


def _stack(bars: Sequence[tuple[str, Mapping[str, float]]], causes: Sequence[str]) -> list[Trace]:
    xs = [bar for bar, _ in bars]
    colours = dict(zip(MEMORY, MEMORY_COLOURS, strict=True))
    return [
        {
            "type": "bar",
            "name": name,
            "x": xs,
            "y": [of.get(name, 0.0) for _, of in bars],
            "marker": {"color": colours[name]},
        }
        for name in causes
        if any(of.get(name, 0) > 0 for _, of in bars)
    ]


_WIRE_COLOURS = {"gather": "#f97316", "refresh": "#e11d8f", "reduce": "#f59e0b"}
_OTHER_COLOUR = "#94a3b8"


def course_of_a_step(run: Run, predicted: Predicted | str) -> Figure | None:
    """Horizontal bars in milliseconds since the step began; None for a run without a trace."""
    measured = last_step(run.trace)
    if not measured:
        return None
    simulated = [] if isinstance(predicted, str) else [span for span in predicted.spans if span.rank == 0]
    bars = [*_rows("measured", measured), *_rows("simulated", simulated)]
    rows = list(dict.fromkeys(row for row, _, _ in bars))
    title = f"{run.name}: a step on rank 0" + (", measured and simulated" if simulated else "")
    in_order = {"categoryorder": "array", "categoryarray": rows[::-1]}
    layout = {"barmode": "overlay", "bargap": 0.25, "yaxis": in_order}
    return Figure(f"timeline-{run.name}", title, _traces(bars), "milliseconds", "", layout)


def last_step(spans: Iterable[Span]) -> list[Span]:
    """The latest recorded step's spans, clipped to it; times count from its beginning."""
    known = list(spans)
    steps = [span for span in known if span.lane == STEPS]
    if not steps:
        return []
    whole = max(steps, key=lambda span: span.start_s)
    inside = [
        span for span in known if span.lane != STEPS and span.end_s > whole.start_s and span.start_s < whole.end_s
    ]
    return [
        Span(
            span.rank,
            span.lane,
            span.name,
            max(span.start_s, whole.start_s) - whole.start_s,
            min(span.end_s, whole.end_s) - whole.start_s,
        )
        for span in inside
    ]


def _rows(kind: str, spans: list[Span]) -> list[tuple[str, str, Span]]:
    """(row, what, span), the compute stream first."""
    ordered = sorted(spans, key=lambda span: (span.lane != COMPUTE, span.lane, span.start_s))
    return [(f"{kind}<br>{span.lane}", span.name.split()[0], span) for span in ordered]


def _traces(bars: list[tuple[str, str, Span]]) -> list[Trace]:
    """A trace for each thing that was done, so that the legend names it."""
    found = []
    for what in dict.fromkeys(what for _, what, _ in bars):
        shown = [(row, span) for row, name, span in bars if name == what]
        found.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": what,
                "y": [row for row, _ in shown],
                "x": [(span.end_s - span.start_s) * 1e3 for _, span in shown],
                "base": [span.start_s * 1e3 for _, span in shown],
                "text": [span.name for _, span in shown],
                "textposition": "none",
                "hovertemplate": "%{text}: %{x:.3g} ms<extra></extra>",
                "marker": {"color": CAUSE_COLOURS.get(what) or _WIRE_COLOURS.get(what, _OTHER_COLOUR)},
            }
        )
    return found
