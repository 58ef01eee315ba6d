"""`thinwire simulate RUN.toml`: one step of a plan, simulated with an event queue, as a timeline and as a trace file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli import SET
from thinwire.cli.plan import space_of, task, tell_notes
from thinwire.errors import ConfigError
from thinwire.files.folders import write_asked
from thinwire.files.trace import Span, trace_text
from thinwire.planner.choose import choose
from thinwire.planner.search import Ranked
from thinwire.planner.space import Space, show_axes, show_states
from thinwire.planner.whynot import check, parse
from thinwire.predict.candidate import Setting
from thinwire.predict.perturbation import Perturbation, default_failures, goodput, run_with_failures
from thinwire.predict.simulate import Simulated, simulate_step
from thinwire.units import show_seconds


def run(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="A run file, as train takes it; [data] may be missing.")
    ],
    settings: Annotated[list[str] | None, SET] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="PLAN", help="What is decided, e.g. tensor=8,pipeline=4; default: the best."),
    ] = None,
    runnable: Annotated[bool, typer.Option(help="Only plans that `thinwire train` runs today.")] = False,
    codecs: Annotated[str, typer.Option(help="Codecs between nodes: none, bf16 or all.")] = "all",
    slow_rank: Annotated[
        list[str] | None,
        typer.Option("--slow-rank", metavar="REPLICA:STAGE:FACTOR", help="A rank that computes slower."),
    ] = None,
    slow_level: Annotated[
        list[str] | None, typer.Option("--slow-level", metavar="LEVEL:FACTOR", help="A level whose links are slower.")
    ] = None,
    jitter: Annotated[float, typer.Option(min=0, max=1, help="Spread of compute times, 0.05 is five percent.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of jitter and failures.")] = 0,
    mtbf_hours: Annotated[
        float | None, typer.Option(max=1e6, help="Mean hours between failures of one rank: simulates a long run too.")
    ] = None,
    width: Annotated[int, typer.Option(min=20, max=400, help="Columns of the timeline.")] = 100,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results for programs.")] = False,
) -> None:
    """Show the timeline of a step, and what slow ranks, slow links, jitter and failures do to it.

    Example: thinwire simulate examples/frontier-20b.toml --plan pipeline=4 --trace step.json
    """
    found = task(run_file, settings or [])
    tell_notes(found)
    ranked = _ranked(found.setting, space_of(found, runnable=runnable, codecs=codecs), plan)
    perturbation = _perturbation(found.setting, ranked, slow_rank or [], slow_level or [], jitter, seed)
    simulated = simulate_step(found.setting, ranked.candidate, ranked.axes, perturbation)
    if trace is not None:
        write_trace(simulated, trace)
    if as_json:
        typer.echo(json.dumps(_document(simulated, ranked), indent=1))
        return
    _print(simulated, ranked, found.setting, width)
    if mtbf_hours is not None:
        _print_failures(simulated, found.setting, mtbf_hours, seed)


def _ranked(setting: Setting, space: Space, plan: str | None) -> Ranked:
    """The best plan of those that `plan` leaves open. Raises PlanError."""
    if plan is not None:
        fields = parse(plan, setting)
        check(fields, setting)
        space = replace(space, fixed={**space.fixed, **fields})
    return choose(setting, space, keep=1, outer="never").best


def _perturbation(
    setting: Setting, ranked: Ranked, ranks: list[str], levels: list[str], jitter: float, seed: int
) -> Perturbation:
    candidate = ranked.candidate
    slow_ranks = {}
    for text in ranks:
        replica, stage, factor = _numbers(text, 3, "--slow-rank", "REPLICA:STAGE:FACTOR, for example 0:2:1.5")
        _within("replica", replica, candidate.data(setting.cluster) * candidate.tensor * candidate.context)
        _within("stage", stage, candidate.pipeline)
        slow_ranks[int(replica), int(stage)] = factor
    slow_levels = {}
    for text in levels:
        name, _, factor_text = text.partition(":")
        (factor,) = _numbers(factor_text, 1, "--slow-level", "LEVEL:FACTOR, for example node:2")
        slow_levels[setting.cluster.index(name)] = factor
    return Perturbation(slow_ranks, slow_levels, jitter, seed)


def _within(what: str, number: float, count: int) -> None:
    if number != int(number) or not 0 <= number < count:
        raise ConfigError(f"--slow-rank: there is no {what} {number:g}; they are 0 to {count - 1}")


def _numbers(text: str, count: int, option: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(0 <= number < 1e9 for number in numbers) or numbers[-1] <= 0:
        raise ConfigError(f"{option} {text!r} is not {form}")
    return numbers


def _document(simulated: Simulated, ranked: Ranked) -> dict[str, object]:
    return {
        "step_s": simulated.step_s,
        "unperturbed_s": ranked.time.total,
        "outer_s": simulated.outer_s,
        "events": simulated.events,
        "ranks": list(simulated.ranks),
        "busy_s": simulated.busy_s,
    }


def _print(simulated: Simulated, ranked: Ranked, setting: Setting, width: int) -> None:
    chosen = ranked.candidate
    typer.echo(f"{show_axes(chosen, setting)}, micro-batch {chosen.micro_batch}, {show_states(chosen, setting)}")
    plain = ranked.time.total
    typer.echo(
        f"one step simulated: {show_seconds(simulated.step_s)} ({simulated.events} events); without perturbations "
        f"{show_seconds(plain)} ({simulated.step_s / plain - 1:+.2%})"
    )
    typer.echo("\n".join(timeline(simulated, width=width)))


def _print_failures(simulated: Simulated, setting: Setting, mtbf_hours: float, seed: int) -> None:
    """A long run with failures, beside the formula."""
    if not mtbf_hours > 0:
        raise ConfigError(f"--mtbf-hours {mtbf_hours:g} must be above 0")
    failures = default_failures(mtbf_hours * 3600)
    ranks = setting.cluster.ranks
    best = goodput(failures, ranks)
    steps = max(100, round(200 * best.mtbf_s / simulated.step_s))
    long_run = run_with_failures(simulated.step_s, steps, failures, ranks, seed=seed)
    typer.echo(
        f"a failure every {show_seconds(best.mtbf_s)}; checkpoints of {show_seconds(failures.checkpoint_s)} every "
        f"{show_seconds(best.interval_s)}, restarts of {show_seconds(failures.restart_s)}: {best.share:.1%} of the time is "
        f"progress, {long_run.goodput:.1%} in a simulated run of {steps} steps with {long_run.failures} failures"
    )


def write_trace(simulated: Simulated, path: Path) -> None:
    """Write the trace file, whole or not at all. Raises ConfigError."""
    write_asked(path, trace_text(simulated.spans, dict(enumerate(simulated.ranks))), option="--trace")


_SIGNS = {"forward": "F", "backward": "B", "optimizer": "O", "gather": "g", "reduce": "r", "refresh": "w", "send": "s"}


def timeline(simulated: Simulated, *, width: int = 100, rows: int = 24) -> list[str]:
    """A line for each stream that was used: the sign of what filled most of each column, or a dot."""
    end = max((span.end_s for span in simulated.spans), default=0.0)
    if end == 0:
        return []
    by_stream: dict[tuple[int, str], list[Span]] = {}
    for span in simulated.spans:
        by_stream.setdefault((span.rank, span.lane), []).append(span)
    names = {
        key: f"{simulated.ranks[key[0]]} {key[1]}"
        for key in sorted(by_stream, key=lambda key: (key[0], key[1] != "compute"))
    }
    drawn = {key: _row(by_stream[key], end, width) for key in names}
    used = [key for key in names if drawn[key].strip(".")]
    indent = max(len(names[key]) for key in used)
    lines = [f"{names[key]:<{indent}} |{drawn[key]}|" for key in used[:rows]]
    if len(used) > rows:
        lines.append(f"({len(used) - rows} more streams)")
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
