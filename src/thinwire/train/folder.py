"""The run folder: one folder out, a documented interface. A run belongs to one resolved run file for its whole life."""

import os
from pathlib import Path

from thinwire.config import differences, dump_toml, load
from thinwire.errors import ConfigError
from thinwire.hub.files import SIDE_FILES, copy_files
from thinwire.hub.init import HUB, keep_beside, verify_init
from thinwire.train.config import MAY_CHANGE, RunConfig
from thinwire.train.job import Job

RUN_FILE, PLAN_FILE, CLUSTER_FILE, EVENTS_FILE = "run.toml", "plan.json", "cluster.json", "events.jsonl"
TRACE_FILE = "trace.json"
CHECKPOINTS, LOGS = "checkpoints", "logs"


def open_folder(job: Job, *, fresh: bool) -> bool:
    """Make or re-open `job.folder`; True if there is a run to go on with.

    `fresh` puts an existing run aside (`NAME.1`, `NAME.2`, ...) and starts anew. The resolved run file, plan and cluster
    are written whole or not at all. Raises ConfigError if the folder belongs to another run or cannot be written,
    CheckpointError if the weights it is to start from have changed.
    """
    folder = job.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a run folder; choose another with --set run.folder=PATH")
    if job.init is not None and (fresh or not any(folder.glob(f"{CHECKPOINTS}/*"))):
        verify_init(job.init, digests=job.config.checkpoint.verify)
    if fresh and (folder / RUN_FILE).exists():
        _put_aside(folder)
    resuming = (folder / RUN_FILE).exists()
    if resuming:
        refuse_other_run(job)
    elif folder.exists() and any(path.name != LOGS for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no {RUN_FILE}; choose another with --set run.folder=PATH")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / RUN_FILE, dump_toml(job.config))
        _write_whole(folder / PLAN_FILE, job.plan.model_dump_json(indent=2) + "\n")
        _write_whole(folder / CLUSTER_FILE, job.cluster.model_dump_json(indent=2) + "\n")
        if job.init is not None:
            keep_beside(job.init, folder)
        elif job.config.model.hf is not None:
            copy_files(job.config.model.hf, folder / HUB, SIDE_FILES)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"the run folder {folder} cannot be written: {reason}; choose another with --set run.folder=PATH"
        ) from None
    return resuming


def refuse_other_run(job: Job) -> None:
    """Raise ConfigError, with the differences, if `job.folder` holds a run that computes something else."""
    old = load(RunConfig, job.folder / RUN_FILE)
    changed = [
        (key, before, after)
        for key, before, after in differences(old.model_dump(mode="json"), job.config.model_dump(mode="json"))
        if not any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)
    ]
    if changed:
        shown = "; ".join(f"{key} was {before!r}, now {after!r}" for key, before, after in changed)
        raise ConfigError(
            f"{job.folder} holds a run with another configuration ({shown}); change it back, use --fresh to put that run "
            f"aside and start anew, or choose another folder with --set run.folder=PATH"
        )


def _put_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)


def _write_whole(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader sees the old text or the new, never half."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
