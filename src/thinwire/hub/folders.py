"""A folder that is there whole or not at all: written hidden beside its place, renamed into it at the end. No torch."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinwire.errors import ConfigError


@contextmanager
def whole_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """A new hidden folder to write into; when the context ends well it becomes `target`, else nothing is left.

    Raises ConfigError if `target` exists (unless `force`), or cannot be written.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target} exists already; choose another folder or use --force to replace it")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}; choose another with -o") from None
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
