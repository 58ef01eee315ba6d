"""Checkpoints of format 1, written through torch.distributed.checkpoint: `.metadata`, a pickle, says where elements lie.

The pickle is read without executing anything: every class it names is replaced by one that only keeps what it is given,
and names that no checkpoint has are refused. Of a tensor's own file (a zip archive of torch.save) only the raw elements
are taken, not the pickle beside them.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from thinwire.checkpoint.manifest import OLD_METADATA, Part, reading
from thinwire.errors import CheckpointError

_MODULES = ("torch", "torch.serialization", "pathlib", "pathlib._local")
_ROOM = "torch.distributed.checkpoint."


class _Record:
    """Stands for whatever object a pickle describes."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Inert(pickle.Unpickler):
    """Imports and calls nothing that the pickle names."""

    def find_class(self, module: str, name: str) -> type[_Record]:
        if module not in _MODULES and not module.startswith(_ROOM):
            raise CheckpointError(f"names {module}.{name}, which no checkpoint does; it was not read any further")
        return _Record


class OldParts:
    """Where the elements of a checkpoint of format 1 lie. Raises CheckpointError if its metadata is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / OLD_METADATA
        with reading(path, missing=f"{path} is missing"):
            raw = path.read_bytes()
        try:
            self._parts, self._sizes = _parts(_Inert(io.BytesIO(raw)).load())
        except CheckpointError as error:
            raise CheckpointError(f"{path} {error}") from None
        except Exception as error:  # whatever bytes that are no pickle lead to
            raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from None

    def of(self, name: str) -> list[Part]:
        return self._parts.get(name, [])

    def read_into(self, out: memoryview, part: Part, skip: int) -> int:
        """Bytes of `part` from `skip` on, and how many there were. Raises OSError, or CheckpointError if damaged."""
        with (self._folder / part.file).open("rb") as file:
            file.seek(part.start)
            blob = file.read(self._sizes[part])
        try:
            with zipfile.ZipFile(io.BytesIO(blob)) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith("/data/0")]
                found = archive.read(name)[skip : skip + len(out)]
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise CheckpointError(f"{self._folder / part.file} is damaged: {error}") from None
        out[: len(found)] = found
        return len(found)


def _parts(metadata: _Record) -> tuple[dict[str, list[Part]], dict[Part, int]]:
    """Tensor name -> parts, and the bytes of each part's archive, from the records of a `Metadata`."""
    lengths = {
        (name, _first(chunk.state["offsets"])): _first(chunk.state["sizes"])
        for name, tensor in metadata.state["state_dict_metadata"].items()
        for chunk in tensor.state["chunks"]
    }
    found: dict[str, list[Part]] = {}
    sizes: dict[Part, int] = {}
    for index, stored in metadata.state["storage_data"].items():
        name, offset, where = index.state["fqn"], _first(index.state["offset"]), stored.state
        file = str(where["relative_path"])
        if Path(file).name != file:
            raise CheckpointError(f"names the file {file!r}, which is not one of its folder")
        part = Part(offset, lengths[name, offset], file, int(where["offset"]))
        found.setdefault(name, []).append(part)
        sizes[part] = int(where["length"])
    return found, sizes


def _first(size: _Record) -> int:
    """The number in a `torch.Size` of one dimension."""
    return int(size.args[0][0])
