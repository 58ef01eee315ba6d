"""`thinwire plan RUN.toml`: what to run on a cluster, what it costs, what limits it. Needs no torch and no accelerator."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.train import SET

if TYPE_CHECKING:
    from thinwire.cli.planning import Task
    from thinwire.planner.choose import Answer


def run(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="A run file, as train takes it; [data] may be missing.")
    ],
    settings: Annotated[list[str] | None, SET] = None,
    top: Annotated[int, typer.Option(min=1, max=50, help="Plans in the table.")] = 5,
    why: Annotated[
        list[str] | None, typer.Option("--why-not", metavar="PLAN", help="Say why not, e.g. tensor=8,pipeline=4.")
    ] = None,
    runnable: Annotated[bool, typer.Option(help="Only plans that `thinwire train` runs today.")] = False,
    codecs: Annotated[str, typer.Option(help="Codecs between nodes: none, bf16 or all.")] = "all",
    outer: Annotated[str, typer.Option(help="Groups that agree rarely: auto, never or always.")] = "auto",
    sensitivity: Annotated[bool, typer.Option(help="Also: at which link rates another plan is best. Slower.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results for programs.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the best runnable plan for train --plan.")
    ] = None,
) -> None:
    """Search for the fastest plans that fit, and explain the best one.

    Example: thinwire plan examples/llama-70b-on-10g.toml --why-not tensor=16
    """
    from thinwire.cli.planning import space_of, task, tell_notes
    from thinwire.errors import ConfigError
    from thinwire.planner.choose import choose

    if outer not in ("auto", "never", "always"):
        raise ConfigError(f"--outer {outer!r} is unknown; there are auto, never and always")
    found = task(run_file, settings or [])
    tell_notes(found)
    space = space_of(found, runnable=runnable, codecs=codecs)
    answer = choose(found.setting, space, keep=max(20, top), outer=outer)  # type: ignore[arg-type]
    if out is not None:
        _write(out, found, answer, codecs, outer)
    if as_json:
        _print_json(found, answer, top)
        return
    _print(found, answer, top)
    for text in why or []:
        from thinwire.planner.whynot import why_not

        typer.echo(f"\nwhy not {why_not(text, found.setting, space, answer.best)}")
    if sensitivity:
        from thinwire.planner.explain import show_flips
        from thinwire.planner.sensitivity import flips

        every = answer.every_step.best[0]
        typer.echo("\n" + "\n".join(show_flips(flips(found.setting, space, every), found.setting)))


def _print(found: "Task", answer: "Answer", top: int) -> None:
    from thinwire.planner.explain import report, show_needed
    from thinwire.planner.sensitivity import needed

    lines = report(answer, found.setting, top=top)
    lines += ["", *show_needed(needed(found.setting, answer.every_step.best[0]), found.setting)]
    typer.echo("\n".join(lines).rstrip())


def _print_json(found: "Task", answer: "Answer", top: int) -> None:
    from thinwire.planner.explain import document

    typer.echo(json.dumps(document(answer, found.setting, top=top), indent=1))


def _write(out: Path, found: "Task", answer: "Answer", codecs: str, outer: str) -> None:
    """The best plan that the trainer runs, searched for again if the best of all is not one. Raises PlanError."""
    from thinwire.cli.planning import space_of
    from thinwire.files.folders import write_asked
    from thinwire.planner.choose import choose

    best = answer.best
    if not best.candidate.runnable:
        space = space_of(found, runnable=True, codecs=codecs)
        best = choose(found.setting, space, keep=1, outer=outer).best  # type: ignore[arg-type]
    plan = best.candidate.to_plan(found.setting)
    write_asked(out, plan.model_dump_json(indent=1) + "\n", option="-o")
