"""A folder that is there whole or not at all: written hidden beside its place, renamed into it at the end. No torch."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from thinwire.errors import ConfigError, ThinwireError


def _never(folder: Path) -> bool:
    return False


@contextmanager
def whole_folder(
    target: Path, *, force: bool, error: type[ThinwireError] = ConfigError, goes_on: Callable[[Path], bool] = _never
) -> Iterator[Path]:
    """A new hidden folder to write into; when the context ends well it becomes `target`, else nothing is left.

    Leftovers of processes that are gone are removed first. One that `goes_on` accepts is taken up instead, and such a
    folder stays, hidden, when the context ends badly. Raises `error` if `target` exists (unless `force`), or cannot be
    written.
    """
    if target.exists() and not force:
        raise error(f"{target} exists already; choose another folder or use --force to replace it")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _take_up(target, partial, goes_on)
        yield partial
        _replace(partial, target)
    except OSError as reason:
        raise error(f"{target} cannot be written: {reason.strerror or reason}; choose another with -o") from None
    finally:
        if not goes_on(partial):
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


def _take_up(target: Path, partial: Path, goes_on: Callable[[Path], bool]) -> None:
    """Make `partial`, or rename a leftover that goes on into it; remove all others."""
    left = [path for path in sorted(target.parent.glob(f".{target.name}.partial-*")) if path == partial or _left(path)]
    kept = next((path for path in left if goes_on(path)), None)
    for path in left:
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    if kept is None:
        partial.mkdir()
    elif kept != partial:
        kept.rename(partial)


def _left(path: Path) -> bool:
    """Whether the process that wrote this hidden folder is gone."""
    owner = path.name.rpartition("-")[2]
    return owner.isdigit() and not _alive(int(owner))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
