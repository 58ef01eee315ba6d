"""One rank of a probe: `python -m thinwire.probe.probe_worker PLACE ...`, or called under torchrun or Slurm."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from thinwire.cluster.cluster import Cluster
from thinwire.comm.place import Place
from thinwire.config import dump_toml
from thinwire.files.folders import write_asked
from thinwire.train.console import forgive
from thinwire.train.stop import take_as_usual
from thinwire.train.worker import failures_reported, leave_with_launcher

if TYPE_CHECKING:
    from thinwire.comm.world import World
    from thinwire.probe.effort import Effort


def probe_rank(cluster: Cluster, place: Place, out: Path, *, quick: bool) -> None:
    """Join the world, measure; rank 0 writes the cluster file, whole or not at all. Raises what joining raises."""
    import torch

    from thinwire.comm.device import keep_heap
    from thinwire.comm.world import World
    from thinwire.probe.effort import Effort

    keep_heap()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    world = World.join(cluster, **asdict(place))
    with world.failures_explained():
        _measure(world, out, Effort.of(cluster.device.kind, quick=quick))
        world.leave()


def _measure(world: "World", out: Path, effort: "Effort") -> None:
    """Measure on all ranks; rank 0 shows how far it is and writes the cluster file."""
    from thinwire.probe.fit import measured_cluster
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
