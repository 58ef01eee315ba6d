"""The manifest of a checkpoint: what it holds and a digest of every file. Written last; without it there is none."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinwire.errors import CheckpointError

MANIFEST, FORMAT = "manifest.json", 1


@dataclass(frozen=True)
class TensorInfo:
    """A logical tensor: what `Piece` says of it, without the elements."""

    shape: tuple[int, ...]
    dtype: str


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
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write and sync `folder/manifest.json`."""
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises CheckpointError, saying what is wrong, if there is none that this version reads."""
        path = folder / MANIFEST
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {MANIFEST}: its writing was cut short") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not of format {FORMAT}, the one this version reads")
        tensors = {name: TensorInfo(tuple(info["shape"]), info["dtype"]) for name, info in tree["tensors"].items()}
        files = {name: FileInfo(**info) for name, info in tree["files"].items()}
        return Manifest(tree["step"], tree["meta"], tensors, files)

    def verify(self, folder: Path, *, digests: bool) -> None:
        """Raises CheckpointError naming the first file that is missing, of another size, or (`digests`) changed."""
        for name, info in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            size = path.stat().st_size
            if size != info.size:
                raise CheckpointError(f"{path} has {size:,} bytes, the manifest says {info.size:,}")
            if digests and digest(path) != info.sha256:
                raise CheckpointError(f"{path} has changed since it was written: its sha256 is not the manifest's")


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Size and digest of files of a folder."""
    return {name: FileInfo((folder / name).stat().st_size, digest(folder / name)) for name in names}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
