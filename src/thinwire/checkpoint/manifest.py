"""The checkpoints of a run folder, and the manifest of each: what it holds and a digest of every file. No torch.

A manifest is written last; without it there is no checkpoint. It is JSON with a digest of its own. Format 1, from before,
has none, and leaves where elements lie to a `.metadata` of torch.distributed.checkpoint.

Every function raises UnreadableError where a folder cannot be looked at: that is not an empty folder.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from thinwire.config import explain, parse_json
from thinwire.errors import CheckpointError, UnreadableError
from thinwire.files.folders import write_atomic

MANIFEST, FORMAT, OLD_FORMAT = "manifest.json", 2, 1
OLD_METADATA = ".metadata"
_DIGEST = "sha256"


class StoredPart(NamedTuple):
    """Elements offset .. offset + length of a flattened tensor: in `file`, from byte `start` on."""

    offset: int
    length: int
    file: str
    start: int


@dataclass(frozen=True)
class TensorInfo:
    """A logical tensor: what `Piece` says of it, and where its elements lie (in format 1 `.metadata` says that)."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[StoredPart, ...] = ()


@dataclass(frozen=True)
class FileInfo:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its elements."""

    step: int
    meta: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: dict[str, FileInfo]
    format: int = field(default=FORMAT)

    def write(self, folder: Path) -> None:
        """Write and sync `folder/manifest.json`."""
        tree = asdict(self)
        write_atomic(folder / MANIFEST, json.dumps({**tree, _DIGEST: _digest_of(tree)}, indent=1))

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises CheckpointError, saying what is wrong, if there is none that this version reads, or it was changed."""
        path = folder / MANIFEST
        with reading(path, missing=f"{folder} has no {MANIFEST}: its writing was cut short"):
            raw = path.read_bytes()
        try:
            tree = parse_json(raw)
        except ValueError as error:
            raise CheckpointError(f"{path} {error}") from None
        if not isinstance(tree, dict) or tree.get("format") not in (FORMAT, OLD_FORMAT):
            raise CheckpointError(f"{path} is not of format {FORMAT}, the one this version writes, or {OLD_FORMAT}")
        if tree.pop(_DIGEST, None) != _digest_of(tree) and tree["format"] == FORMAT:
            raise CheckpointError(f"{path} has changed since it was written: its sha256 is another")
        try:
            manifest = TypeAdapter(Manifest).validate_python(tree)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {explain(error)}") from None
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Raises CheckpointError if it contradicts itself, as one that was edited by hand does."""
        files = {OLD_METADATA} if self.format == OLD_FORMAT else set()
        files |= {part.file for info in self.tensors.values() for part in info.parts}
        lacking = sorted(files - set(self.files))
        if not self.files or lacking:
            raise CheckpointError(f"{path} names no {lacking[0] if lacking else 'file'} under `files`: it was edited")
        for name in self.files:
            if Path(name).name != name:
                raise CheckpointError(f"{path} names the file {name!r}, which is not one of this folder: it was edited")
        step, updates = self.meta.get("step", self.step), self.meta.get("updates", 0)
        if step != self.step or not isinstance(updates, int) or not 0 <= updates <= self.step:
            raise CheckpointError(
                f"{path} is of step {self.step}, its meta says step {step} and {updates} updates: it was edited"
            )

    def verify(self, folder: Path, *, digests: bool) -> None:
        """Raises CheckpointError naming the first file that is missing, of another size, or (`digests`) changed."""
        for name, info in self.files.items():
            path = folder / name
            with reading(path, missing=f"{path} is missing"):
                size = path.stat().st_size
                if size != info.size:
                    raise CheckpointError(f"{path} has {size:,} bytes, the manifest says {info.size:,}")
                if digests and digest(path) != info.sha256:
                    raise CheckpointError(f"{path} has changed since it was written: its sha256 is not the manifest's")


@contextmanager
def reading(path: Path, *, missing: str) -> Iterator[None]:
    """CheckpointError(`missing`) where nothing of that kind is there; UnreadableError where one cannot look.

    Those are different things: what cannot be read just now may be whole.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(missing) from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"{path} cannot be read: {error.strerror or error}; it may be whole, so nothing was done: make it readable and "
        f"start again, or move it away"
    )


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Size and digest of files of a folder."""
    return {name: FileInfo((folder / name).stat().st_size, digest(folder / name)) for name in names}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(tree: dict[str, Any]) -> str:
    """Of the JSON in one certain spelling."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
