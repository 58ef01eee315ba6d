"""Draws `thin_network.py`: a bar chart for each rate."""

from typing import Any

from matplotlib.figure import Figure

COLOURS = {"thinwire": "#1b6ca8", "peer": "#b0b0b0", "limit": "#b3261e", "exact": "#e39b00"}


def draw(report: dict[str, Any]) -> Figure:
    """A panel per rate: tokens/s of every side, with what no network, and no exact method, can beat."""
    bound = report["limits"]
    rates = list(bound["exact_tokens_per_s"])
    rows = [row for row in report["rows"] if row["side"] != "no network"][::-1]
    figure = Figure(figsize=(6 + 5 * max(1, len(rates)), 1.8 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, max(1, len(rates)), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=False):
        panel.set_title(rate)
        panel.set_xlabel("tokens/s, logarithmic")
        panel.set_xscale("log")
        for place, row in enumerate(rows):
            measured = row["rates"].get(rate)
            if measured is None:
                said = (row["error"] or "not measured")[:60]
                panel.text(0.01, place, said, transform=panel.get_yaxis_transform(), va="center", fontsize=7)
                continue
            kind = "thinwire" if row["side"].startswith("thinwire") else "peer"
            panel.barh(place, measured["tokens_per_s"], color=COLOURS[kind])
            panel.text(measured["tokens_per_s"], place, f" {measured['tokens_per_s']:.0f}", va="center", fontsize=8)
        if bound["no_network_tokens_per_s"] is not None:
            panel.axvline(bound["no_network_tokens_per_s"], color=COLOURS["limit"], label="no network at all")
        panel.axvline(
            bound["exact_tokens_per_s"][rate], color=COLOURS["exact"], linestyle="--", label="exact: 4Ψ bytes"
        )
        speeds = [row["rates"][rate]["tokens_per_s"] for row in rows if rate in row["rates"]]
        panel.set_xlim(left=0.5 * min([*speeds, bound["exact_tokens_per_s"][rate]]))
        panel.set_ylim(-0.7, len(rows) - 0.3)
        panel.set_yticks(range(len(rows)), [row["side"] for row in rows])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("2 hosts x 2 ranks, one slow link between the hosts")
    return figure
