"""The run folder: one folder out, a documented interface. A run belongs to one resolved run file for its whole life."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.checkpoint.manifest import (
    list_checkpoints,
    list_torn,
    open_checkpoint,
    path_of,
    remove_partial,
    step_of,
)
from thinwire.config import build, differences, dump_toml, read_toml
from thinwire.errors import CheckpointError, ConfigError
from thinwire.files.events import read_events
from thinwire.files.folders import write_atomic
from thinwire.files.locks import LOCK, Lock, hold
from thinwire.hub.files import SIDE_FILES, copy_files
from thinwire.hub.init import HUB, keep_beside, verify_init
from thinwire.train.config import MAY_CHANGE, WARMUP_STEPS, RunConfig
from thinwire.train.job import Job
from thinwire.train.schedule import said_of_changes

RUN_FILE, PLAN_FILE, CLUSTER_FILE, EVENTS_FILE = "run.toml", "plan.json", "cluster.json", "events.jsonl"
TRACE_FILE = "trace.json"
CHECKPOINTS, LOGS = "checkpoints", "logs"


@dataclass(frozen=True)
class Opened:
    """A run folder that is ours to write. A context: leaving it lets others write."""

    resuming: bool
    """Whether there is a run to go on with."""
    lock: Lock
    done: int = 0
    """Steps that the newest checkpoint has behind it."""
    said: tuple[str, ...] = ()
    """What changes from here on, in sentences."""

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def open_folder(job: Job, *, fresh: bool) -> Opened:
    """Make or re-open `job.folder` as its only writer.

    `fresh` puts an existing run aside (`NAME.1`, `NAME.2`, ...) and starts anew. The resolved run file, plan and cluster
    are written atomically; what a killed run left half-written is removed. Raises ConfigError if the folder
    belongs to another run, or to a process that is training in it, or cannot be read or written; CheckpointError if the
    weights it is to start from have changed, or the run's checkpoints are gone.
    """
    folder = job.folder
    with _refusal_explained(folder, "read"):
        _refuse_other_things(folder)
    if job.init is not None and (fresh or not list_checkpoints(folder / CHECKPOINTS)):
        verify_init(job.init, digests=job.config.checkpoint.verify)
    with _refusal_explained(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder)
        try:
            if fresh and present(folder / RUN_FILE):
                lock = _put_aside(folder, lock)
            resuming = present(folder / RUN_FILE)
            done = _done(folder) if resuming else 0
            said = _fill(job, resuming=resuming, done=done)
        except BaseException:
            lock.release()
            raise
    return Opened(resuming, lock, done, said)


@contextmanager
def _refusal_explained(folder: Path, what: str) -> Iterator[None]:
    """Raises what the system refuses as a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be {what}: {error.strerror or error}; choose another with --set "
            f"run.folder=PATH"
        ) from None


def _refuse_other_things(folder: Path) -> None:
    """Raise ConfigError for a file, or a folder with other things in it. Nothing is written there."""
    if not present(folder):
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a run folder; choose another with --set run.folder=PATH")
    lacks = next((name for name in (RUN_FILE, PLAN_FILE) if not present(folder / name)), None)
    begun = (LOGS, LOCK, PLAN_FILE, CLUSTER_FILE)
    if lacks and any(path.name not in begun for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no {lacks}; choose another with --set run.folder=PATH")


def _done(folder: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    kept = list_checkpoints(folder / CHECKPOINTS)
    return step_of(kept[-1]) if kept else 0


def _fill(job: Job, *, resuming: bool, done: int) -> tuple[str, ...]:
    """What a resumed run changes, in sentences."""
    folder = job.folder
    said: tuple[str, ...] = ()
    if resuming:
        said = said_of_changes(refuse_other_run(job), job.config, done)
        _refuse_lost_checkpoints(folder)
        _refuse_emulated_again(job)
    remove_partial(folder / CHECKPOINTS)
    write_atomic(folder / PLAN_FILE, job.plan.model_dump_json(indent=2) + "\n")
    write_atomic(folder / CLUSTER_FILE, job.cluster.model_dump_json(indent=2) + "\n")
    write_atomic(folder / RUN_FILE, dump_toml(job.config))  # last: where it stands alone, it is a user's
    if job.init is not None:
        keep_beside(job.init, folder)
    elif job.config.model.hf is not None:
        copy_files(job.config.model.hf, folder / HUB, SIDE_FILES)
    return said


def said_if_finished(job: Job, done: int) -> str | None:
    """A sentence if there is nothing left to do after step `done`: the last step's checkpoint is there, and whole."""
    steps, newest = job.config.run.steps, path_of(job.folder / CHECKPOINTS, done)
    if done < steps:
        return None
    try:
        open_checkpoint(newest, digests=job.config.checkpoint.verify)
    except CheckpointError:  # told, and passed over, by the ranks
        return None
    return (
        f"{job.folder} is finished: {done} of {steps} steps are done, {newest} holds the model; for more set a larger "
        f"run.steps, or start anew with --fresh"
    )


def _refuse_lost_checkpoints(folder: Path) -> None:
    """Raise CheckpointError if the run has saved before and nothing of it is there: it would begin anew unasked."""
    kept = folder / CHECKPOINTS
    if list_checkpoints(kept) or list_torn(kept) or not present(folder / EVENTS_FILE):
        return
    try:
        saved = [record.get("step") for record in read_events(folder / EVENTS_FILE, "checkpoint")]
    except ValueError as error:
        raise ConfigError(f"{folder / EVENTS_FILE} is damaged: {error}") from None
    if saved:
        raise CheckpointError(
            f"{kept} holds no checkpoint any more, though that of step {saved[-1]} was saved; put it back, or start anew "
            f"with --fresh, which puts this run aside"
        )


def _refuse_emulated_again(job: Job) -> None:
    """Raise ConfigError for a folder in which compute has been emulated: nothing is saved that a run could go on from."""
    if job.emulated and present(job.folder / EVENTS_FILE):
        raise ConfigError(
            f"{job.folder} holds a run with emulated compute, which keeps nothing to go on from; start anew with --fresh, "
            f"which puts it aside, or choose another folder with --set run.folder=PATH"
        )


def refuse_other_run(job: Job) -> RunConfig:
    """The run file so far. Raise ConfigError, with the differences, if the run in `job.folder` computes something else."""
    old = build(RunConfig, read_toml(job.folder / RUN_FILE), str(job.folder / RUN_FILE))
    changed = [
        (key, before, after)
        for key, before, after in differences(_compared(old), _compared(job.config))
        if not any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)
    ]
    if changed:
        shown = "; ".join(f"{key} was {before!r}, now {after!r}" for key, before, after in changed)
        raise ConfigError(
            f"{job.folder} holds a run with another configuration ({shown}); change it back, use --fresh to put that run "
            f"aside and start anew, or choose another folder with --set run.folder=PATH"
        )
    return old


def _compared(config: RunConfig) -> dict[str, Any]:
    """Every key; what a file leaves out is as in the files of those who write the default, earlier versions among them."""
    tree = config.model_dump(mode="json")
    if tree["schedule"]["warmup_steps"] is None:
        tree["schedule"]["warmup_steps"] = WARMUP_STEPS
    if tree["data"]["cross_documents"] is None:
        tree["data"]["cross_documents"] = True
    return tree


def _put_aside(folder: Path, lock: Lock) -> Lock:
    """Rename the run that `lock` holds and make the folder anew: its lock."""
    number = 1
    while present(aside := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    folder.rename(aside)
    lock.moved_to(aside)
    folder.mkdir(exist_ok=True)
    new = hold(folder)
    lock.release()
    return new


def present(path: Path) -> bool:
    """Whether something is there. Raises OSError where that cannot be told: `Path.exists` may call it absent."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
