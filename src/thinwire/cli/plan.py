"""`thinwire plan RUN.toml`: what to run on a cluster, what it costs, what limits it. Needs no torch and no accelerator.

`simulate` asks here too for the setting that a run file means, which needs no `[data]` for either.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli import SET
from thinwire.cluster.cluster import Cluster
from thinwire.cluster.hardware import calibration_of
from thinwire.config import load
from thinwire.errors import ConfigError
from thinwire.files.folders import write_asked
from thinwire.hub.families import stand_in
from thinwire.hub.init import read_init
from thinwire.model.config import check_vocabulary
from thinwire.model.spec import ModelSpec
from thinwire.plan.plan import Plan, read_plan
from thinwire.planner.choose import choose
from thinwire.planner.explain import document, report
from thinwire.planner.listing import listing, program_document
from thinwire.planner.search import Choice, Ranked
from thinwire.planner.sensitivity import flips, needed, show_flips, show_needed
from thinwire.planner.space import COMPRESSION, Space
from thinwire.planner.whynot import why_not
from thinwire.predict.candidate import Candidate, CandidateSync, Setting, thinwire_with
from thinwire.predict.planned import planned
from thinwire.train.config import RunFile
from thinwire.train.job import default_folder, expected_vocabulary


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
    outer: Annotated[str, typer.Option(help="Groups that synchronise rarely: auto, never or always.")] = "auto",
    sensitivity: Annotated[bool, typer.Option(help="Also: at which link rates another plan is best. Slower.")] = False,
    program: Annotated[bool, typer.Option(help="Also: every operation of a step of the best plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results for programs.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the best runnable plan for train --plan.")
    ] = None,
) -> None:
    """Search for the fastest plans that fit, and explain the best one.

    Example: thinwire plan examples/llama-70b-on-10g.toml --why-not tensor=16
    """
    if outer not in ("auto", "never", "always"):
        raise ConfigError(f"--outer {outer!r} is unknown; there are auto, never and always")
    found = task(run_file, settings or [])
    tell_notes(found)
    space = space_of(found, runnable=runnable, codecs=codecs)
    answer = choose(found.setting, space, keep=max(20, top), outer=outer)  # type: ignore[arg-type]
    if out is not None:
        _write(out, found, answer, codecs, outer)
    if as_json:
        _print_json(found, answer, top, program=program)
        return
    _print(found, answer, top)
    for text in why or []:
        typer.echo(f"\nwhy not {why_not(text, found.setting, space, answer.best)}")
    if sensitivity:
        every = answer.every_step.best[0]
        typer.echo("\n" + "\n".join(show_flips(flips(found.setting, space, every), found.setting)))
    if program:
        typer.echo("\n" + "\n".join(_program(found.setting, answer.best)))


def _program(setting: Setting, best: Ranked) -> list[str]:
    """The step program of the best plan, in words."""
    cluster, made = setting.cluster, planned(setting, best.candidate, best.axes)
    return [f"program of plan 1, digest {made.digest}:", *listing(made, cluster.level_names, cluster.ranks)]


def _print(found: "Task", answer: Choice, top: int) -> None:
    lines = report(answer, found.setting, top=top)
    lines += ["", *show_needed(needed(found.setting, answer.every_step.best[0]), found.setting)]
    typer.echo("\n".join(lines).rstrip())


def _print_json(found: "Task", answer: Choice, top: int, *, program: bool) -> None:
    said = document(answer, found.setting, top=top)
    if program:
        said["program"] = program_document(planned(found.setting, answer.best.candidate, answer.best.axes))
    typer.echo(json.dumps(said, indent=1))


def _write(out: Path, found: "Task", answer: Choice, codecs: str, outer: str) -> None:
    """The best plan that the trainer runs, searched for again if the best of all is not one. Raises PlanError."""
    best = answer.best
    if not best.candidate.runnable:
        space = space_of(found, runnable=True, codecs=codecs)
        best = choose(found.setting, space, keep=1, outer=outer).best  # type: ignore[arg-type]
    plan = best.candidate.to_plan(found.setting)
    write_asked(out, plan.model_dump_json(indent=1) + "\n", option="-o")


@dataclass(frozen=True)
class Task:
    """A run file, resolved."""

    file: RunFile
    setting: Setting
    fixed: dict[str, object]
    """What `[plan]` and `[batch]` decide."""
    sync: CandidateSync | None
    """Rounds of worker groups, if `[plan]` decides them."""
    notes: tuple[str, ...] = ()
    """What is planned in place of what the formulas do not know, in sentences."""


def task(run_file: Path, settings: Sequence[str]) -> Task:
    """Read and resolve. Raises ConfigError, DataError or PlanError with one sentence."""
    file = load(RunFile, run_file, settings)
    cluster = file.cluster.resolve(run_file.parent)
    spec, notes = _spec(file, file.run.folder or default_folder(run_file))
    if file.batch.tokens > spec.max_tokens:
        raise ConfigError(
            f"{run_file}: batch.tokens = {file.batch.tokens} is longer than the model's {spec.max_tokens} positions; "
            f"lower batch.tokens or set model.max_tokens = {file.batch.tokens}"
        )
    given = file.plan.model_fields_set
    dtype = (
        file.plan.compute_dtype if "compute_dtype" in given else ("fp32" if cluster.device.kind == "cpu" else "bf16")
    )
    setting = Setting(
        spec,
        cluster,
        file.batch.sequences,
        file.batch.tokens,
        thinwire_with(file.optimizer),
        calibration=calibration_of(cluster),
        compute_dtype=dtype,
    )
    plan = _decided(file, cluster)
    point = Candidate.of_plan(plan, spec.layers)
    return Task(file, setting, {name: getattr(point, name) for name in _names(file, plan)}, point.sync, notes)


def _spec(file: RunFile, folder: Path) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model, from wherever `train` would take it, and what the formulas take it for where they do not know it."""
    vocabulary = None if file.data is None else expected_vocabulary(file.data)
    if file.model.init is not None:
        spec, notes = read_init(file.model.init, kept=folder).spec, tuple[str, ...]()
    elif file.model.hf is not None:
        spec, notes = stand_in(file.model.hf, kept=folder, lora=file.model.lora)
    else:
        return file.model.resolve(vocabulary), ()
    check_vocabulary(spec.vocab_size, vocabulary, "prepare the corpus with the tokenizer.json of that model")
    return spec, notes


def _decided(file: RunFile, cluster: Cluster) -> Plan:
    """The plan that the file names, or that its `[plan]` is so far. Raises PlanError if it does not fit."""
    if file.plan.file is not None:
        return read_plan(file.plan.file, cluster, sequences=file.batch.sequences // cluster.ranks)
    return file.plan.resolve(cluster, micro_batch=file.batch.micro_batch or 1, accumulate=1)


def _names(file: RunFile, plan: Plan) -> list[str]:
    """Fields of a candidate that the file decides; `partition = "auto"` decides nothing."""
    if file.plan.file is not None:
        return ["depths", "keep_gathered", "recompute", "micro_batch", *COMPRESSION]
    given = file.plan.model_fields_set
    found = ["micro_batch"] if file.batch.micro_batch is not None else []
    found += [name for name in ("recompute", "keep_gathered") if name in given]
    found += ["depths"] if file.plan.partition != "auto" else []
    return found + (
        [*COMPRESSION] if "compression" in given or plan.compression.weights or plan.compression.grads else []
    )


def tell_notes(found: Task) -> None:
    """On standard error: what is printed may be for programs."""
    for note in found.notes:
        typer.echo(f"thinwire: {note}", err=True)


def space_of(found: Task, *, runnable: bool, codecs: str) -> Space:
    """The space that the options leave open. Raises ConfigError for an unknown word."""
    if codecs not in ("none", "bf16", "all"):
        raise ConfigError(f"--codecs {codecs!r} is unknown; there are none, bf16 and all")
    return Space(runnable=runnable, codecs=codecs, fixed=found.fixed, sync=found.sync)  # type: ignore[arg-type]
