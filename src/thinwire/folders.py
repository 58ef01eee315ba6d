"""A folder that is there whole or not at all: written hidden beside its place, renamed into it at the end. No torch."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinwire.errors import ConfigError, ThinwireError


@contextmanager
def whole_folder(target: Path, *, force: bool, error: type[ThinwireError] = ConfigError) -> Iterator[Path]:
    """A new hidden folder to write into; when the context ends well it becomes `target`, else nothing is left.

    Leftovers of processes that are gone are removed first. Raises `error` if `target` exists (unless `force`), or cannot
    be written.
    """
    if target.exists() and not force:
        raise error(f"{target} exists already; choose another folder or use --force to replace it")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as reason:
        raise error(f"{target} cannot be written: {reason.strerror or reason}; choose another with -o") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Hidden folders beside `target` whose process is gone."""
    for path in target.parent.glob(f".{target.name}.partial-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
