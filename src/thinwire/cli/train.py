"""`thinwire train RUN.toml`: on one machine it starts the ranks itself; under torchrun or Slurm it is one of them.

Of a run that ran out of memory it says which setting would have fitted, by the planner's formula. No torch.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli import SET
from thinwire.cluster.cluster import check_size, show_levels
from thinwire.cluster.hardware import calibration_of, check_ranks, described, found_gpus
from thinwire.comm.interfaces import addresses, asked
from thinwire.comm.place import Place
from thinwire.errors import PlanError
from thinwire.model.spec import ModelSpec
from thinwire.plan.partition import resolve_partition
from thinwire.plan.plan import Plan
from thinwire.predict import placement
from thinwire.predict.candidate import Candidate, Setting, thinwire_with
from thinwire.predict.peak_memory import peak_memory
from thinwire.train.folder import Opened, open_folder, said_if_finished
from thinwire.train.job import Job, crowding, emulation, read_config, refuse_crossing, resolve
from thinwire.train.launch import Ending, LocalRanks, launch, refuse_taken
from thinwire.train.stop import listening
from thinwire.train.worker import run_external
from thinwire.units import show_bytes, show_count


def run(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")],
    settings: Annotated[list[str] | None, SET] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Put an existing run aside (NAME.1) and start anew.")] = False,
    plan: Annotated[Path | None, typer.Option(help="Run this plan, as `thinwire plan -o` writes it.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port for the ranks to meet at; default: any free one.", min=1, max=65535)
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(help="Where a launcher starts one process a node: how many ranks each starts.", min=1, max=10_000),
    ] = None,
) -> None:
    """Train what RUN.toml describes; the same command resumes a run that was stopped or killed.

    Example: thinwire train examples/stdlib.toml --set run.steps=500
    """
    decided = [*(settings or []), *([f"plan.file={plan.resolve()}"] if plan is not None else [])]
    place = Place.from_environment(os.environ, nodes=ranks_per_node is not None, command=called())
    if place is not None and place.rank > 0:
        warnings.simplefilter("ignore", FutureWarning)  # rank 0 says it
    if place is None:
        _train_here(run_file, decided, fresh=fresh, port=port, ranks=ranks_per_node)
    elif ranks_per_node is not None:
        _train_node(place, run_file, decided, ranks_per_node, fresh=fresh)
    else:
        _train_as(place, run_file, decided, fresh=fresh)


def called() -> str:
    """The command line by which this process was started."""
    return shlex.join(["thinwire", *sys.argv[1:]])


def _train_here(run_file: Path, settings: list[str], *, fresh: bool, port: int | None, ranks: int | None) -> None:
    """Check everything, make the run folder, start the ranks, tell how they ended. `ranks`: how many were asked for."""
    config = read_config(run_file, settings)
    if port is not None:
        refuse_taken(port)
    if ranks is not None:
        check_size(config.cluster.resolve(run_file.parent), ranks)
    job = resolve(run_file, config, prepare=True, say=typer.echo)
    job.config.tracking.check()
    refuse_crossing(job)
    if job.cluster.ranks > 1 or job.cluster.interface:
        asked(job.cluster.interface, os.environ, addresses(), cuda=job.cluster.device.kind == "cuda")
    warning = None if job.emulated else crowding(job.cluster.ranks)
    _tell_device(job, job.cluster.ranks)
    with open_folder(job, fresh=fresh) as opened:
        if finished := said_if_finished(job, opened.done):
            typer.echo(finished)
            return
        _greet(job, opened)
        if warning:
            typer.secho(f"warning: {warning}", fg="yellow", err=True)
        share = LocalRanks.whole(job.cluster.ranks, port)
        leave(launch([str(run_file), *settings], share=share, folder=job.folder, lock=opened.lock.descriptor), job)


def _train_node(place: Place, run_file: Path, settings: list[str], ranks_per_node: int, *, fresh: bool) -> None:
    """Start the ranks of one node; a launcher like this one does so on every other. The first makes the run folder."""
    config, share = read_config(run_file, settings), LocalRanks.of_node(place, ranks_per_node)
    config.tracking.check()
    check_size(config.cluster.resolve(run_file.parent), share.size)
    with listening() as stop:
        job = resolve(run_file, config, prepare=True, stopped=lambda: stop.asked, say=typer.echo)
    refuse_crossing(job)
    _tell_device(job, share.count)
    with open_folder(job, fresh=fresh) if place.rank == 0 else nullcontext() as opened:
        if opened is not None:
            _greet(job, opened)
            if finished := said_if_finished(job, opened.done):
                typer.echo(finished)
        lock = None if opened is None else opened.lock.descriptor
        leave(launch([str(run_file), *settings], share=share, folder=job.folder, lock=lock), job)


def leave(ending: Ending, job: Job | None = None) -> None:
    """Tell whose fault it was, if it was somebody's, and exit with the run's status."""
    if ending.failure is not None:
        failure = ending.failure
        named = failure.names_a_rank or failure.rank < 0
        who = "" if named else f"rank {failure.rank}: "
        fits = advice(job, failure.needed_bytes, failure.capacity_bytes) if job and failure.needed_bytes else ""
        typer.echo(f"thinwire: {who}{failure.sentence}{fits and '; '}{fits}", err=True)
        if ending.failure.details:
            typer.echo(ending.failure.details.rstrip(), err=True)
    sys.exit(ending.status)


def _train_as(place: Place, run_file: Path, settings: list[str], *, fresh: bool) -> None:
    """Be one rank of a world that torchrun or Slurm started."""
    run_external(place, run_file, settings, fresh=fresh, advise=advice)


def _tell_device(job: Job, ranks: int) -> None:
    """Say what computes. Raises ConfigError if this machine has too few GPUs for its `ranks` ranks."""
    if (line := emulation(job)) is not None:
        typer.echo(line)
        return
    seen = found_gpus(os.environ)
    check_ranks(job.cluster, ranks, seen)
    typer.echo(described(job.cluster, seen))


def _greet(job: Job, opened: Opened) -> None:
    resuming = opened.resuming
    levels = show_levels(job.cluster.shape)
    typer.echo(
        f"{'going on with' if resuming else 'starting'} {job.folder}: {show_count(job.spec.parameters)} parameters, "
        f"{levels} = {job.cluster.ranks} ranks, {job.config.batch.sequences} x {job.config.batch.tokens} tokens per step "
        f"in {job.plan.accumulate} micro-batches of {job.plan.micro_batch} per rank"
    )
    for sentence in opened.said:
        typer.echo(sentence)


def advice(job: Job, needed_bytes: float, capacity_bytes: float) -> str:
    """The mildest change that fits, by the formula raised to what was seen to be needed: for the end of a sentence."""
    spec, plan = job.spec, job.plan
    if not isinstance(spec, ModelSpec) or capacity_bytes <= 0:
        return _any(plan)
    here = predicted_bytes(job, spec, plan)
    factor = max(1.0, needed_bytes / here)
    for settings, other in milder(plan):
        bytes_ = factor * predicted_bytes(job, spec, other)
        if bytes_ <= capacity_bytes:
            return f"{settings} would fit: {show_bytes(bytes_)} of {show_bytes(capacity_bytes)}"
    return f"no smaller micro-batch, recomputation or partition fits {show_bytes(capacity_bytes)}: take more ranks"


def _any(plan: Plan) -> str:
    """What needs less memory of any model, of what the run does not do already."""
    levels = plan.levels_in_group
    ways = ["a smaller batch.micro_batch"] if plan.micro_batch > 1 else []
    ways += ["plan.recompute = 'full'"] if plan.recompute != "full" else []
    ways += ["a partition sharded further (zero2, zero3)"] if levels and min(plan.depths) < levels - 1 else []
    return f"{' or '.join(ways)} needs less" if ways else "take more ranks, or shorter batch.tokens"


def milder(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """(settings in words, the plan they make), those first that cost least time."""
    share, partitions = plan.micro_batch * plan.accumulate, [("", plan)]
    for name in ("zero1", "zero2", "zero3"):
        levels = plan.level_names if plan.sync is None else plan.level_names[: plan.levels_in_group]
        partition, _ = resolve_partition(name, levels)
        sharded = plan.model_copy(update={"partition": partition})
        if any(new > old for new, old in zip(sharded.depths, plan.depths, strict=True)):
            partitions.append((f"plan.partition = '{name}'", sharded))
    sizes = [size for size in range(plan.micro_batch, 0, -1) if share % size == 0]
    for named, sharded in partitions:
        for recompute in dict.fromkeys((plan.recompute, "full")):
            for size in sizes:
                words = [f"batch.micro_batch = {size}"] if size != plan.micro_batch else []
                words += [f"plan.recompute = '{recompute}'"] if recompute != plan.recompute else []
                words += [named] if named else []
                if words:
                    changed = {"micro_batch": size, "accumulate": share // size, "recompute": recompute}
                    yield " with ".join(words), sharded.model_copy(update=changed)


def predicted_bytes(job: Job, spec: ModelSpec, plan: Plan) -> float:
    """Of the fullest rank, by the planner's formula. Links' figures do not matter for it, but it wants some."""
    levels = tuple(
        level.model_copy(update={"bytes_per_s": level.bytes_per_s or 1e9, "latency_s": level.latency_s or 1e-5})
        for level in job.cluster.levels
    )
    cluster = job.cluster.model_copy(update={"levels": levels})
    calibration, batch = calibration_of(cluster), job.config.batch
    framework, dtype = thinwire_with(job.config.optimizer), plan.compute_dtype
    setting = Setting(spec, cluster, batch.sequences, batch.tokens, framework, calibration, dtype)
    candidate = Candidate.of_plan(plan, spec.layers)
    try:
        return peak_memory(setting, candidate, placement.place(candidate, cluster, calibration)).total
    except PlanError:  # the axes do not divide: it cannot be advised
        return float("inf")
