"""Draws `outer_study.py`: a row of panels for each number of groups and H, loss by tokens and by bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curve = Sequence[Mapping[str, Any]]
COLOURS = {
    "data-parallel": "black", "no exchange": "#888888", "diloco": "#1b6ca8", "streaming fp32": "#2e8b57",
    "streaming e3m0": "#e39b00", "streaming e3m0 summed": "#a0522d",
    "streaming int4": "#8e5ea2", "eager": "#b3261e", "co2": "#00a6a6",
}  # fmt: skip
SHOWN_OF_FALL = 0.75
"""Losses above this share of the way down from the start to the best are left out of the picture."""


def draw(curves: Mapping[tuple[int, int, str], Curve], least_mb: Mapping[int, float]) -> Figure:
    """Mean over the seeds with least and largest as a band; `least_mb` of an exact method, by groups."""
    places = sorted({(groups, inner_steps) for groups, inner_steps, _ in curves if inner_steps > 1})
    figure = Figure(figsize=(13, 1 + 3.6 * len(places)), layout="constrained")
    panels = figure.subplots(max(1, len(places)), 2, squeeze=False)
    bottom, top = _limits(list(curves.values()))
    for (groups, inner_steps), (by_tokens, by_bytes) in zip(places, panels, strict=False):
        for (m, h, kind), curve in curves.items():
            if m == groups and h in (1, inner_steps):
                _line(by_tokens, [point["tokens"] / 1e3 for point in curve], curve, kind)
                if curve[-1]["sent_bytes"]:
                    _line(by_bytes, [point["sent_bytes"] / 1e6 for point in curve], curve, kind)
                else:
                    by_bytes.axhline(curve[-1]["loss"], color=COLOURS[kind], linewidth=1.3, label=kind)
        by_bytes.axvline(least_mb[groups], color="#555555", linestyle="--", label="least bytes of an exact method")
        by_bytes.set_xscale("log")
        for panel, what in ((by_tokens, "thousand tokens"), (by_bytes, "MB sent out of a group, logarithmic")):
            panel.set_title(f"{groups} groups, H = {inner_steps}")
            panel.set_xlabel(what)
            panel.set_ylabel("validation loss")
            panel.set_ylim(bottom, top)
            panel.grid(alpha=0.25)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    return figure


def _line(panel: Axes, x: Sequence[float], curve: Curve, kind: str) -> None:
    """The first point has no bytes, which a logarithm does not show."""
    colour = COLOURS[kind]
    panel.plot(x[1:], [point["loss"] for point in curve[1:]], color=colour, label=kind, linewidth=1.3)
    panel.fill_between(
        x[1:], [point["least"] for point in curve[1:]], [point["largest"] for point in curve[1:]], color=colour, alpha=0.15,
        linewidth=0,
    )  # fmt: skip


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    best = min(point["least"] for curve in curves for point in curve)
    start = max(curve[0]["largest"] for curve in curves)
    return best - 0.02 * (start - best), start - SHOWN_OF_FALL * (start - best)
