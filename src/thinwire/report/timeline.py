"""One step of a run, lane by lane: what rank 0 did, and below it the same step as the simulator plays it."""

from collections.abc import Iterable

from thinwire.report.figures import CAUSE_COLOURS, Figure, Trace
from thinwire.report.predict import Predicted
from thinwire.report.read import Run
from thinwire.trace import COMPUTE, STEPS, Span

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
    """The latest recorded step's spans, cut to it; times count from its beginning."""
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
    """(row, what, span), the compute lane first."""
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
