"""One rank of a run: `python -m thinwire.train.worker PLACE RUN_FILE [SETTING ...]`, or called under torchrun or Slurm."""

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from thinwire.cluster.cluster import check_size
from thinwire.cluster.hardware import described, found_gpus
from thinwire.comm.place import Place
from thinwire.errors import ShortOfMemory, StopAsked, ThinwireError
from thinwire.train.console import forgive
from thinwire.train.folder import open_folder, said_if_finished
from thinwire.train.job import Job, emulation, read_config, refuse_crossing, resolve, statement
from thinwire.train.launch import describe
from thinwire.train.stop import StopRequest

if TYPE_CHECKING:
    from thinwire.comm.world import World

Advise = Callable[[Job, float, float], str]
"""(job, bytes needed, bytes there are) -> which setting would fit."""


def run_rank(job: Job, place: Place, stop: StopRequest, *, advise: Advise | None = None) -> None:
    """Join the world, train, leave it. Raises what training raises; `advise` ends the sentence of a shortage of memory."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of sockets are not for users
    import torch

    from thinwire.comm.device import keep_heap
    from thinwire.comm.world import World

    keep_heap()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    world = World.join(
        job.cluster,
        **asdict(place),
        timeout_s=job.config.run.timeout,
        stopped=lambda: stop.at_once,
        statement=statement(job),
        device=torch.device("cpu") if job.emulated else None,
    )
    if place.rank == 0 and world.introduction is not None:
        print(world.introduction, flush=True)
    with world.failures_explained():
        try:
            train_job(job, world, stop)
        except ShortOfMemory as error:
            if advise is not None:
                error.args = (f"{error}; {advise(job, error.needed_bytes, error.capacity_bytes)}",)
            raise
        world.leave()


def train_job(job: Job, world: "World", stop: StopRequest) -> None:
    """Train `job` in a world that has been joined. Raises what training raises."""
    from thinwire.train.announce import held_bytes
    from thinwire.train.assemble import assemble
    from thinwire.train.loop import train
    from thinwire.train.shortage import shortage_explained

    with shortage_explained(world.device, sharing=world.cluster.levels[0].fanout) as held:
        parts = assemble(job, world)
        held.update(held_bytes(parts.sharded, job.config.optimizer.state_numbers))
        try:
            train(job, parts, stop)
        finally:
            parts.close()


def main(arguments: Sequence[str]) -> int:
    """A rank started by the local launcher. Returns the exit status; a failure is written to the report file."""
    forgive()
    own = json.loads(arguments[0])
    leave_with_launcher(own["launcher_pipe"])
    stop = StopRequest()
    stop.listen()
    place = Place(**own["place"])
    with failures_reported(place, Path(own["report"])):
        run_file = Path(arguments[1])
        run_rank(resolve(run_file, read_config(run_file, arguments[2:])), place, stop)
    return 0


@contextmanager
def failures_reported(place: Place, report: Path) -> Iterator[None]:
    """A failure inside is written to `report`, shown by ranks that nobody watches, and ends this process at once."""
    try:
        yield
    except StopAsked as error:
        leave_unbegun(place, error)
    except BaseException as error:
        said = describe(place.rank, error)
        said.write(report)
        if place.rank != 0:
            print(said.details or f"thinwire: {said.sentence}", file=sys.stderr)
        leave_now(1)


def run_external(
    place: Place, run_file: Path, settings: Sequence[str], *, fresh: bool, advise: Advise | None = None
) -> None:
    """Be one rank that a launcher started: rank 0 makes the run folder, the others wait for it in the world.

    Raises ThinwireError for wrong input. A failure of the run is told in one sentence, with its traceback if it is none
    of ours, and ends this process at once so that the launcher sees it.
    """
    stop = StopRequest()
    stop.listen()
    try:
        job = _checked(place, run_file, settings, stop)
    except StopAsked as error:
        leave_unbegun(place, error)
    except ThinwireError as error:
        if place.rank == 0:
            raise
        print(f"thinwire: {error}", file=sys.stderr, flush=True)
        _tell(place, error)
        leave_now(error.exit_status)
    if place.rank == 0:
        print(emulation(job) or described(job.cluster, found_gpus(os.environ)), flush=True)
    opened = open_folder(job, fresh=fresh) if place.rank == 0 else None
    if opened is not None:
        finished = said_if_finished(job, opened.done)
        for sentence in [*opened.said, *([finished] if finished else [])]:
            print(sentence, flush=True)
    try:
        run_rank(job, place, stop, advise=advise)
    except StopAsked as error:
        leave_unbegun(place, error)
    except ThinwireError as error:
        print(f"thinwire: {error}", file=sys.stderr)
        leave_now(error.exit_status)
    except BaseException as error:
        report = describe(place.rank, error)
        print(f"thinwire: rank {place.rank}: {report.sentence}\n{report.details}", file=sys.stderr)
        leave_now(1)
    if opened is not None:
        opened.lock.release()


def _checked(place: Place, run_file: Path, settings: Sequence[str], stop: StopRequest) -> Job:
    """The run file resolved, its corpus made. Raises ThinwireError for wrong input, and StopAsked."""
    config = read_config(run_file, settings)
    config.tracking.check()
    check_size(config.cluster.resolve(run_file.parent), place.size)
    job = resolve(run_file, config, prepare=True, stopped=lambda: stop.asked, say=partial(_say, place))
    refuse_crossing(job)
    return job


def _tell(place: Place, error: ThinwireError) -> None:
    """Tell the ranks whose input is right, and who would wait for this one."""
    from thinwire.comm.rendezvous import tell_rank_0

    tell_rank_0(place.rank, place.size, place.host, place.port, str(error))


def _say(place: Place, sentence: str) -> None:
    if place.local_rank == 0:
        print(sentence, flush=True)


def leave_unbegun(place: Place, stop: StopAsked) -> NoReturn:
    """Leave because of a stop that was asked for before the ranks had met."""
    if place.rank == 0:
        print(stop)
    leave_now(stop.exit_status)


def leave_now(status: int) -> NoReturn:
    """Leave without waiting for communicators whose peers may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_with_launcher(pipe: int) -> None:
    """Leave at once when the launcher's end of `pipe` closes: no rank outlives it."""

    def watch() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    sys.exit(main(sys.argv[1:]))
