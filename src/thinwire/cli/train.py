"""`thinwire train RUN.toml`: on one machine it starts the ranks itself; under torchrun or Slurm it is one of them."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from thinwire.cluster.cluster import Cluster
    from thinwire.comm.place import Place
    from thinwire.train.folder import Opened
    from thinwire.train.job import Job
    from thinwire.train.launch import Ending

SET = typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the run file; may be repeated.")


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
    from thinwire.comm.place import Place

    decided = [*(settings or []), *([f"plan.file={plan.resolve()}"] if plan is not None else [])]
    place = Place.from_environment(os.environ, nodes=ranks_per_node is not None, command=called())
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
    from thinwire.cluster.cluster import check_size
    from thinwire.comm.interfaces import addresses, asked
    from thinwire.train.folder import open_folder, said_if_finished
    from thinwire.train.job import crowding, read_config, refuse_crossing, resolve
    from thinwire.train.launch import Share, launch, refuse_taken

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
    warning = crowding(job.cluster.ranks)
    _tell_device(job.cluster, job.cluster.ranks)
    with open_folder(job, fresh=fresh) as opened:
        if finished := said_if_finished(job, opened.done):
            typer.echo(finished)
            return
        _greet(job, opened)
        if warning:
            typer.secho(f"warning: {warning}", fg="yellow", err=True)
        share = Share.whole(job.cluster.ranks, port)
        leave(launch([str(run_file), *settings], share=share, folder=job.folder, lock=opened.lock.descriptor), job)


def _train_node(place: "Place", run_file: Path, settings: list[str], ranks_per_node: int, *, fresh: bool) -> None:
    """Start the ranks of one node; a launcher like this one does so on every other. The first makes the run folder."""
    from contextlib import nullcontext

    from thinwire.cluster.cluster import check_size
    from thinwire.train.folder import open_folder, said_if_finished
    from thinwire.train.job import read_config, refuse_crossing, resolve
    from thinwire.train.launch import Share, launch
    from thinwire.train.stop import listening

    config, share = read_config(run_file, settings), Share.of_node(place, ranks_per_node)
    config.tracking.check()
    check_size(config.cluster.resolve(run_file.parent), share.size)
    with listening() as stop:
        job = resolve(run_file, config, prepare=True, stopped=lambda: stop.asked, say=typer.echo)
    refuse_crossing(job)
    _tell_device(job.cluster, share.count)
    with open_folder(job, fresh=fresh) if place.rank == 0 else nullcontext() as opened:
        if opened is not None:
            _greet(job, opened)
            if finished := said_if_finished(job, opened.done):
                typer.echo(finished)
        lock = None if opened is None else opened.lock.descriptor
        leave(launch([str(run_file), *settings], share=share, folder=job.folder, lock=lock), job)


def leave(ending: "Ending", job: "Job | None" = None) -> None:
    """Tell whose fault it was, if it was somebody's, and exit with the run's status."""
    if ending.failure is not None:
        failure = ending.failure
        named = failure.names_a_rank or failure.rank < 0
        who = "" if named else f"rank {failure.rank}: "
        fits = _advise(job, failure.needed_bytes, failure.capacity_bytes) if job and failure.needed_bytes else ""
        typer.echo(f"thinwire: {who}{failure.sentence}{fits and '; '}{fits}", err=True)
        if ending.failure.details:
            typer.echo(ending.failure.details.rstrip(), err=True)
    sys.exit(ending.status)


def _advise(job: "Job", needed_bytes: float, capacity_bytes: float) -> str:
    """Which setting would have fitted."""
    from thinwire.cli.shortage import advice

    return advice(job, needed_bytes, capacity_bytes)


def _train_as(place: "Place", run_file: Path, settings: list[str], *, fresh: bool) -> None:
    """Be one rank of a world that torchrun or Slurm started."""
    from thinwire.train.worker import run_external

    run_external(place, run_file, settings, fresh=fresh, advise=_advise)


def _tell_device(cluster: "Cluster", ranks: int) -> None:
    """Say what computes. Raises ConfigError if this machine has too few GPUs for its `ranks` ranks."""
    from thinwire.cluster.found import check_ranks, described, found_gpus

    seen = found_gpus(os.environ)
    check_ranks(cluster, ranks, seen)
    typer.echo(described(cluster, seen))


def _greet(job: "Job", opened: "Opened") -> None:
    from thinwire.units import show_count

    resuming = opened.resuming
    levels = " x ".join(f"{level.name}={level.fanout}" for level in job.cluster.levels)
    typer.echo(
        f"{'going on with' if resuming else 'starting'} {job.folder}: {show_count(job.spec.parameters)} parameters, "
        f"{levels} = {job.cluster.ranks} ranks, {job.config.batch.sequences} x {job.config.batch.tokens} tokens a step "
        f"in {job.plan.accumulate} micro-batches of {job.plan.micro_batch} a rank"
    )
    for sentence in opened.said:
        typer.echo(sentence)
