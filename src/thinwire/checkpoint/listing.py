"""The checkpoints of a run folder by name: what is there, what was put aside, what a killed run left half-written.

No torch. Every function raises UnreadableError where the folder cannot be looked at: that is not an empty folder.
"""

import os
import secrets
import shutil
from pathlib import Path

from thinwire.checkpoint.manifest import Manifest, unreadable
from thinwire.errors import CheckpointError

_PREFIX, _DIGITS, _TORN, _PARTIAL = "step-", 8, ".torn", ".partial"


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / f"{_PREFIX}{step:0{_DIGITS}d}"


def new_partial(final: Path) -> Path:
    """A hidden place beside `final` to write it in; of no other writer, who may be a rank that outlived its run."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{_PARTIAL}")


def step_of(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, whole or not."""
    return sorted((path for path in _folders(folder) if path.name[len(_PREFIX) :].isdigit()), key=step_of)


def list_torn(folder: Path) -> list[Path]:
    """Checkpoints that were put aside."""
    return [path for path in _folders(folder) if _TORN in path.name]


def put_aside(path: Path) -> Path:
    """Rename a checkpoint that cannot be used to `NAME.torn`, `NAME.torn2`, ...: its new path."""
    number, aside = 1, path.with_name(path.name + _TORN)
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{_TORN}{number}")
    try:
        return path.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"{path} is not whole and cannot be put aside: {error.strerror or error}; move it away by hand"
        ) from None


def remove_partial(folder: Path) -> None:
    """Delete what a run that is gone was writing. Only for who holds the run's lock."""
    for leftover in folder.glob(f".{_PREFIX}*{_PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)


def open_checkpoint(path: Path, *, digests: bool) -> Manifest:
    """The manifest of a verified checkpoint. Raises CheckpointError saying what is wrong."""
    manifest = Manifest.read(path)
    if manifest.step != step_of(path):
        raise CheckpointError(f"{path} holds the checkpoint of step {manifest.step}: it was renamed")
    manifest.verify(path, digests=digests)
    return manifest


def _folders(folder: Path) -> list[Path]:
    """Not by glob, which takes a folder that it may not read for an empty one."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIX) and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, error) from None
