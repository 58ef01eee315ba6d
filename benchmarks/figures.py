"""Writes a report of `thin_network.py` to a folder: JSON, a Markdown table, a bar chart as PNG, and all of it as HTML."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NAME = "thin_network"
COLOURS = {"thinwire": "#1b6ca8", "peer": "#b0b0b0", "limit": "#b3261e", "exact": "#e39b00"}


def write_report(
    report: dict[str, Any], folder: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]
) -> None:
    """`NAME`.json, .md, .png and `NAME`_page.html in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report).savefig(folder / f"{NAME}.png", dpi=110)
    told = [*lines, *origin(report)]
    (folder / f"{NAME}.md").write_text(markdown(columns, rows, told), encoding="utf-8")
    (folder / f"{NAME}_page.html").write_text(page(columns, rows, told, folder / f"{NAME}.png"), encoding="utf-8")


def origin(report: dict[str, Any]) -> list[str]:
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [f"Command: `{report['command']}`", f"{report['date']}; {used}."]


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
    panels[0].legend(loc="lower right", fontsize=8)
    figure.suptitle("2 hosts x 2 ranks, one slow link between the hosts")
    return figure


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    table = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    told = "\n\n".join(lines)
    return f"# Slow links, in one run\n\n![tokens/s by side and rate]({NAME}.png)\n\n{body}\n\n{told}\n"


def page(columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str], picture: Path) -> str:
    """One file that needs no other."""
    inline = base64.b64encode(picture.read_bytes()).decode("ascii")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    told = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    style = (
        "body{font:15px sans-serif;margin:5vw}img{max-width:100%}.wide{overflow-x:auto}p{overflow-wrap:anywhere}"
        "td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Slow links</title><style>{style}</style><h1>Slow links, in one run</h1>'
        f'<img alt="tokens/s by side and rate" src="data:image/png;base64,{inline}">'
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{told}\n'
    )
