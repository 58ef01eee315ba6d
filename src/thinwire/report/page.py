"""The page: one HTML file with plotly inside it, so that it opens without a network. Follows the reader's light or dark.

Runs in, one file out: written whole or not at all.
"""

import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from thinwire.cluster.cluster import Cluster, show_levels
from thinwire.files.folders import write_asked
from thinwire.report import figures
from thinwire.report.figures import Figure, course_of_a_step
from thinwire.report.read import Predicted, Run, number, predict, read_runs
from thinwire.units import show_bytes, show_count, show_seconds

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b2430; --soft: #5b6675; --line: #d9dee5; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181e; --ink: #e6e9ee; --soft: #9aa5b3; --line: #333b46; --card: #1b2129; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 1280px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: .2rem .4rem; } p { margin: .4rem 0; } .soft { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem; min-width: 0; }
.figure { height: 340px; width: 100%; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } pre { font-size: .8rem; overflow-x: auto; margin: .4rem 0; }
"""
_SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const figures = JSON.parse(document.getElementById("figures").textContent);
function colours() {
  const read = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return { ink: read("--ink"), line: read("--line") };
}
function axis(title, c) {
  return { title: { text: title }, gridcolor: c.line, linecolor: c.line, zerolinecolor: c.line, automargin: true };
}
function draw() {
  const c = colours();
  for (const f of figures) {
    const layout = { ...f.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: c.ink, size: 12 }, margin: { l: 50, r: 12, t: 8, b: 44 },
      xaxis: axis(f.x_title, c), yaxis: { ...axis(f.y_title, c), exponentformat: "SI", ...f.layout.yaxis },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, showlegend: true };
    Plotly.react(f.name, f.traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}
draw();
dark.addEventListener("change", draw);
"""


def page(runs: Sequence[Run], predictions: Sequence[Predicted | str]) -> str:
    """The whole document."""
    from plotly.offline import get_plotlyjs

    sections, drawn = _sections(runs, predictions)
    data = json.dumps([vars(figure) for figure in drawn], separators=(",", ":")).replace("<", "\\u003c")
    title = "thinwire: " + ", ".join(run.name for run in runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(sections)
        + f'\n<script type="application/json" id="figures">{data}</script>\n<script>{get_plotlyjs()}</script>\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _sections(runs: Sequence[Run], predictions: Sequence[Predicted | str]) -> tuple[list[str], list[Figure]]:
    loss = figures.loss_figures(runs)
    seconds = [figures.time_figure(runs, predictions), *map(figures.course_figure, runs)]
    wire = [figure for run in runs if (figure := figures.wire_figure(run)) is not None]
    memory = figures.memory_figures(runs, predictions)
    quiet = [run.name for run in runs if run.thin_level is None]
    still = _text(f"{', '.join(quiet)}: one rank, nothing was sent.") if quiet else ""
    slept = [run.name for run in runs if run.emulated]
    no_loss = _text(f"{', '.join(slept)}: compute was emulated, so there is no loss.") if slept else ""
    course = [
        figure for run, expected in zip(runs, predictions, strict=True) if (figure := course_of_a_step(run, expected))
    ]
    drawn = [*loss, *seconds, *course, *wire, *memory]
    # Names of runs may hold anything; ids are numbers.
    ids = {id(figure): f"figure-{index}-{figure.name.split('-')[0]}" for index, figure in enumerate(drawn)}
    sections = [
        _heading("Runs compared", _table(_OVERVIEW, [_overview(run) for run in runs])),
        _heading("Loss", no_loss, _grid(loss, ids)),
        _heading("Step time", _grid(seconds, ids), _time_table(runs, predictions)),
        *([_heading("One step, moment by moment", _text(_MOMENTS), _grid(course, ids))] if course else []),
        _heading("Bytes per level", still, _grid(wire, ids), *map(_wire_table, runs)),
        _heading("Memory", _grid(memory, ids) if memory else _text("These runs do not say what they held.")),
        _heading("The plan and why", *(_plan(*pair) for pair in zip(runs, predictions, strict=True))),
    ]
    named = [
        Figure(ids[id(f)], f.title, f.traces, f.x_title, f.y_title, f.layout) for f in drawn
    ]  # fmt: skip
    return sections, named


_MOMENTS = (
    "A measured message lasts from when it was issued until it was waited for; a simulated one, until it arrives."
)


def _heading(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _text(text: str) -> str:
    return f'<p class="soft">{html.escape(text)}</p>'


def _grid(drawn: Iterable[Figure], ids: dict[int, str]) -> str:
    cards = "".join(
        f'<div class="card"><h3>{html.escape(figure.title)}</h3><div class="figure" id="{ids[id(figure)]}"></div></div>'
        for figure in drawn
    )
    return f'<div class="grid">{cards}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="scroll"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'


_OVERVIEW = (
    "run", "parameters", "levels", "states (P; G; O)", "steps", "tokens", "last loss", "validation loss", "median step",
    "tokens/s", "MFU", "exposed comm", "bytes per step",
)  # fmt: skip


def _overview(run: Run) -> list[str]:
    last, step_s = run.steps[-1], median(record["step_s"] for record in run.latest)
    rate = median(record["tokens_per_s"] for record in run.latest)
    utilisation = [value for record in run.latest if (value := number(record["mfu"])) is not None]
    sent = sum(count for purposes in run.wire.values() for count in purposes.values())
    exposed = run.seconds.get("comm", 0.0) / max(1e-12, sum(run.seconds.values()))
    return [
        run.name,
        show_count(run.start["parameters"]),
        show_levels(run.cluster.shape),
        str(run.plan.partition),
        f"{last['step']:,}",
        show_count(run.along("tokens")[-1]),
        _loss(last["loss"]),
        _loss(run.evals[-1]["loss"]) if run.evals else "-",
        show_seconds(step_s),
        f"{rate:,.0f}",
        f"{median(utilisation):.1%}" if utilisation else "-",
        f"{exposed:.1%}",
        show_bytes(sent) if sent else "-",
    ]


def _loss(value: object) -> str:
    shown = number(value)
    if value is None:
        return "-"
    return str(value) if shown is None else f"{shown:.4f}"


def _time_table(runs: Sequence[Run], predictions: Sequence[Predicted | str]) -> str:
    parts, rows = [], []
    for run, predicted in zip(runs, predictions, strict=True):
        if isinstance(predicted, str):
            parts.append(_text(f"{run.name}: no prediction: {predicted}"))
            continue
        measured, expected = figures.merged(run.seconds), figures.said(predicted)
        rows += [
            [run.name, cause, *_beside(expected.get(cause), measured.get(cause, 0.0), show_seconds)]
            for cause in dict.fromkeys([*expected, *measured])
        ]
        rows.append([run.name, "all", *_beside(sum(expected.values()), sum(measured.values()), show_seconds)])
    head = ("run", "cause", "predicted", "measured", "predicted / measured - 1")
    return "".join(parts) + (_table(head, rows) if rows else "")


def _wire_table(run: Run) -> str:
    rows = [
        [run.name, level, purpose, *_beside(expected, measured, show_bytes)]
        for level, purpose, expected, measured in figures.wire_rows(run)
    ]
    return (
        _table(("run", "level", "purpose", "predicted", "measured", "predicted / measured - 1"), rows) if rows else ""
    )


def _beside(expected: float | None, measured: float, show: Callable[[float], str]) -> list[str]:
    error = f"{expected / measured - 1:+.2%}" if expected is not None and measured > 0 else "-"
    return ["-" if expected is None else show(expected), show(measured), error]


def _plan(run: Run, predicted: Predicted | str) -> str:
    plan, partition = run.plan, run.plan.partition
    rows = [
        ["parameters are sharded over", partition.params],
        ["gradients are sharded over", partition.grads],
        ["optimizer states are sharded over", partition.optimizer],
        [
            "weights travel as",
            ", ".join(f"{level}: {codec}" for level, codec in plan.compression.weights.items()) or "they are",
        ],
        [
            "gradients travel as",
            ", ".join(f"{level}: {codec}" for level, codec in plan.compression.grads.items()) or "they are",
        ],
        ["micro-batches", f"{plan.accumulate} of {plan.micro_batch} sequences per rank"],
        ["recompute", plan.recompute],
        ["compute precision", plan.compute_dtype],
        ["plan digest", plan.digest],
    ]
    parts = [f"<h3>{html.escape(run.name)}</h3>", _table(("decision", ""), rows), _text(_limit(run))]
    if isinstance(predicted, str):
        return "".join([*parts, _text(f"What the planner would say is not known: {predicted}")])
    said = html.escape("\n".join(predicted.advice).rstrip())
    parts += [_text(predicted.rests_on), _text("The best plans for this model, batch and cluster that train runs:")]
    return "".join([*parts, f"<pre>{said}</pre>"])


def _limit(run: Run) -> str:
    """What takes most of a step, in words."""
    seconds = figures.merged(run.seconds)
    cause = max(seconds, key=lambda name: seconds[name])
    share = seconds[cause] / max(1e-12, sum(seconds.values()))
    where = f", most bytes over level {_busiest(run)}" if cause == "comm" and run.thin_level else ""
    return f"Measured: {cause} takes most of a step, {share:.0%}{where}."


def _busiest(run: Run) -> str:
    return max(run.wire, key=lambda level: sum(run.wire[level].values()))


def write_report(folders: Sequence[Path], out: Path, *, cluster: Cluster | None = None) -> int:
    """Write the page to `out`; returns its bytes. Raises ConfigError for a folder that is no run, or an `out` that
    cannot be written. Predictions rest on `cluster` if given, else on each run's own."""
    runs = read_runs(folders)
    text = page(runs, [predict(run, cluster) for run in runs])
    write_asked(out, text, option="-o")
    return len(text.encode())
