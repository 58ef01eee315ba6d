"""`thinwire probe -o cluster.toml`: measure a cluster; starts the ranks itself, or is one of them.

The local launcher starts a rank as `python -m thinwire.cli.probe PLACE ...`; torchrun and srun start the command itself.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from thinwire.cli.train import called, leave
from thinwire.cluster.cluster import Cluster, check_size, read_cluster
from thinwire.cluster.config import ClusterConfig
from thinwire.cluster.hardware import check_ranks, described, found_gpus
from thinwire.comm.place import Place
from thinwire.config import build, dump_toml
from thinwire.errors import ConfigError
from thinwire.files.folders import check_writable, scratch_folder, write_asked
from thinwire.probe.effort import Effort
from thinwire.probe.fit import measured_cluster
from thinwire.train.console import forgive
from thinwire.train.launch import LocalRanks, launch
from thinwire.train.stop import take_as_usual
from thinwire.train.worker import failures_reported, leave_with_launcher
from thinwire.units import show_count, show_rate, show_seconds, whole_number

if TYPE_CHECKING:
    from thinwire.comm.world import World


def run(
    out: Annotated[Path, typer.Option("-o", "--out", help="The cluster file to write.")] = Path("cluster.toml"),
    levels: Annotated[
        str | None,
        typer.Option(help="Levels, inner first: node=2,cluster=4; default: node= all ranks (2 on one machine)."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="What the ranks compute on, as `thinwire presets` lists it; default: found.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes, sizes and repetitions: seconds, not minutes.")
    ] = False,
) -> None:
    """Time matmuls by shape, copies, collectives by size on every level, and compute beside communication.

    Example: thinwire probe --levels node=2 -o cluster.toml
    """
    place, seen = Place.from_environment(os.environ, command=called()), found_gpus(os.environ)
    on_cpu = device == "cpu" or not seen
    cluster = _cluster(levels or f"node={place.size if place else 2 if on_cpu else len(seen)}", device)
    if place is None or place.rank == 0:
        check_writable(out, option="-o")
        typer.echo(described(cluster, seen))
    if place is None:
        check_ranks(cluster, cluster.ranks, seen)
        _probe_here(cluster, out, quick=quick)
    else:
        check_size(cluster, place.size)
        probe_rank(cluster, place, out, quick=quick)
    if place is None or place.rank == 0:
        _tell(out)


def _cluster(levels: str, device: str | None) -> Cluster:
    """Raises ConfigError for what is no list of levels."""
    found: list[dict[str, Any]] = []
    for part in levels.split(","):
        name, equals, fanout = part.partition("=")
        if not equals or (number := whole_number(fanout.strip())) is None:
            raise ConfigError(f"--levels {levels!r}: {part!r} is no level; write for example node=2,cluster=4")
        found.append({"name": name.strip(), "fanout": number})
    return build(ClusterConfig, {"device": device, "levels": found}, "--levels").resolve()


def _probe_here(cluster: Cluster, out: Path, *, quick: bool) -> None:
    arguments = [cluster.model_dump_json(), str(out.absolute()), "quick" if quick else "full"]
    with scratch_folder() as folder:
        share = LocalRanks.whole(cluster.ranks)
        ending = launch(arguments, share=share, folder=folder, worker="thinwire.cli.probe")
    if ending.status:
        leave(ending)


def _tell(out: Path) -> None:
    cluster = read_cluster(out)
    device = cluster.device
    typer.echo(
        f"wrote {out}: {show_count(device.peak_flops_per_s or 0)}FLOP/s, "
        f"{show_count(device.memory_bytes_per_s or 0)}B/s of memory"
    )
    for level in cluster.levels:
        if level.bytes_per_s is not None and level.latency_s is not None:
            typer.echo(f"  {level.name}: {show_rate(level.bytes_per_s)}, {show_seconds(level.latency_s)}")


def probe_rank(cluster: Cluster, place: Place, out: Path, *, quick: bool) -> None:
    """Join the world, measure; rank 0 writes the cluster file, whole or not at all. Raises what joining raises."""
    import torch

    from thinwire.comm.device import keep_heap
    from thinwire.comm.world import World

    keep_heap()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    world = World.join(cluster, **asdict(place))
    with world.failures_explained():
        _measure(world, out, Effort.of(cluster.device.kind, quick=quick))
        world.leave()


def _measure(world: "World", out: Path, effort: Effort) -> None:
    """Measure on all ranks; rank 0 shows how far it is and writes the cluster file."""
    from thinwire.probe.measure import measure, parts

    shown = Progress(
        TextColumn("[bold]probe"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
        console=Console(stderr=True), disable=world.rank != 0,
    )  # fmt: skip
    with shown:
        task = shown.add_task("start", total=parts(world, effort))
        timings = measure(world, effort, lambda what: shown.update(task, description=what, advance=1))
    if world.rank == 0:
        write(measured_cluster(world.cluster, timings), out)


def write(cluster: Cluster, out: Path) -> None:
    """Raises ConfigError if `out` cannot be written."""
    write_asked(out, dump_toml(cluster), option="-o")


def main(arguments: Sequence[str]) -> int:
    """A rank started by the local launcher. Returns the exit status; a failure is written to the report file."""
    forgive()
    own = json.loads(arguments[0])
    leave_with_launcher(own["launcher_pipe"])
    take_as_usual()
    place = Place(**own["place"])
    with failures_reported(place, Path(own["report"])):
        cluster = Cluster.model_validate_json(arguments[1])
        probe_rank(cluster, place, Path(arguments[2]), quick=arguments[3] == "quick")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    sys.exit(main(sys.argv[1:]))
