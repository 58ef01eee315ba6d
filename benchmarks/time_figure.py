"""Draws `time_to_loss.py`: held-out loss by seconds and by bytes, with what cannot be beaten."""

from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from sides import NO_NETWORK


def draw(report: dict[str, Any]) -> Figure:
    """A line for each side and seed, up to the look that met the target; a dot there if it did."""
    bound = report["limits"]
    runs = [run for run in report["runs"] if run["side"] != NO_NETWORK and run["looks"]]
    names = list(dict.fromkeys(run["side"] for run in runs))
    figure = Figure(figsize=(13, 6), layout="constrained")
    by_seconds, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        looks = run["looks"]
        colour = colormaps["tab20"](names.index(run["side"]) % 20)
        dashes = "-" if run["side"].startswith("thinwire") else "--"
        first = all(other is run or other["side"] != run["side"] for other in runs[: runs.index(run) + 1])
        label = run["side"] if first else None
        for panel, x in (
            (by_seconds, [look["seconds"] for look in looks]),
            (by_bytes, [look["sent_bytes"] / 1e6 for look in looks]),
        ):
            losses = [look["loss"] for look in looks]
            panel.plot(x, losses, color=colour, linestyle=dashes, linewidth=1.3, label=label)
            if run["reached"]:
                panel.plot(x[-1], losses[-1], "o", color=colour, markersize=4)
    if bound["no_network_s"] is not None:
        by_seconds.axvline(bound["no_network_s"], color="#b3261e", label="DDP's steps without any network")
    by_seconds.axvline(bound["exact_s"], color="#e39b00", linestyle=":", label="DDP's steps, exact: least seconds")
    by_bytes.axvline(bound["exact_mb"], color="#e39b00", linestyle=":", label="DDP's steps, exact: least bytes")
    for panel, what in ((by_seconds, "seconds, logarithmic"), (by_bytes, "MB out of a host, logarithmic")):
        panel.set_xscale("log")
        panel.set_xlabel(what)
        panel.grid(alpha=0.25)
    by_seconds.set_ylabel("held-out loss")
    handles, labels = by_seconds.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure
