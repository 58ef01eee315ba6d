"""Pieces in files: every rank writes one, in the layout of safetensors, and the manifest says where which elements lie.

The layout: eight bytes with the length of a JSON header, the header, then elements back to back. It is written and read
here, not by the library: so nothing is copied, only the bytes that a rank needs are read, and a disk that fails is an
error with a sentence (the library maps files into memory, where it is a SIGBUS). A test opens the files with the library.

Checkpoints of format 1, written through torch.distributed.checkpoint: `.metadata`, a pickle, says where elements lie.

The pickle is read without executing anything: every class it names is replaced by one that only keeps what it is given,
and names that no checkpoint has are refused. Of a tensor's own file (a zip archive of torch.save) only the raw elements
are taken, not the pickle beside them.

Reading a checkpoint outside training: one process, no world, one tensor at a time.
"""

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.checkpoint.manifest import (
    OLD_FORMAT,
    OLD_METADATA,
    FileInfo,
    Manifest,
    StoredPart,
    list_checkpoints,
    open_checkpoint,
    reading,
    step_of,
)
from thinwire.errors import CheckpointError, UnreadableError
from thinwire.parallel.shard.layout import Piece

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNED = 8


def write_pieces(path: Path, pieces: Sequence[Piece]) -> tuple[FileInfo, list[StoredPart]]:
    """Write and sync one file: what the manifest says of it, and where each piece lies. Raises OSError.

    `pieces` are on the CPU. Wide types come first, so that every element is aligned.
    """
    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].tensor.element_size())
    header, starts, end = {}, [0] * len(pieces), 0
    for i in order:
        piece = pieces[i]
        starts[i], end = end, end + piece.tensor.nbytes
        if piece.tensor.numel():
            header[f"{piece.name}@{piece.offset}"] = {
                "dtype": _name(piece), "shape": [piece.tensor.numel()], "data_offsets": [starts[i], end],
            }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNED)
    sha256, first = hashlib.sha256(), _ALIGNED + len(text)
    with path.open("wb", buffering=0) as file:
        head = [memoryview(len(text).to_bytes(_ALIGNED, "little")), memoryview(text)]
        for raw in (*head, *(_bytes(pieces[i].tensor) for i in order)):
            sha256.update(raw)
            _write_all(file.fileno(), raw)
        os.fsync(file.fileno())
    parts = [StoredPart(p.offset, p.tensor.numel(), path.name, first + starts[i]) for i, p in enumerate(pieces)]
    return FileInfo(first + end, sha256.hexdigest()), parts


def _name(piece: Piece) -> str:
    if piece.tensor.dtype not in _NAMES:
        raise CheckpointError(f"{piece.name!r} is of {piece.tensor.dtype}, which checkpoints do not hold")
    return _NAMES[piece.tensor.dtype]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a flat tensor."""
    memory: Any = tensor.detach().contiguous().view(torch.uint8).numpy()
    return memoryview(memory)


def _write_all(descriptor: int, left: memoryview) -> None:
    while left:
        left = left[os.write(descriptor, left) :]


class PiecesReader:
    """The elements of a checkpoint. Only those asked for are read; nothing in its files is executed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._old = OldParts(folder) if manifest.format == OLD_FORMAT else None

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fill the pieces' tensors. Raises CheckpointError for a tensor that is not there or differs."""
        for piece in pieces:
            if piece.tensor.numel():
                self._fill(piece)

    def _fill(self, piece: Piece) -> None:
        stored = self._manifest.tensors.get(piece.name)
        if stored is None:
            raise CheckpointError(
                f"{self._folder} has no tensor {piece.name!r}; it was saved by another model or optimizer"
            )
        count = torch.Size(stored.shape).numel()
        if count != torch.Size(piece.shape).numel() or stored.dtype != str(piece.tensor.dtype):
            raise CheckpointError(
                f"{self._folder}: {piece.name!r} has {count:,} elements of {stored.dtype}, here it has "
                f"{torch.Size(piece.shape).numel():,} of {piece.tensor.dtype}; model or precision differ"
            )
        first, last = piece.offset, piece.offset + piece.tensor.numel()
        found = 0
        for part in stored.parts if self._old is None else self._old.of(piece.name):
            begin, end = max(first, part.offset), min(last, part.offset + part.length)
            if begin < end:
                self._read(part, begin - part.offset, piece.tensor[begin - first : end - first])
                found += end - begin
        if found != piece.tensor.numel():
            raise CheckpointError(
                f"{self._folder}: {piece.name!r} holds {found:,} of the {piece.tensor.numel():,} elements from "
                f"{piece.offset:,} on"
            )

    def _read(self, part: StoredPart, skip: int, out: Tensor) -> None:
        """Elements `skip` .. `skip + len(out)` of a part."""
        target = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty_like(out, device="cpu")
        path = self._folder / part.file
        with reading(path, missing=f"{path} is missing"):
            if self._old is not None:
                read = self._old.read_into(_bytes(target), part, skip * out.element_size())
            else:
                with path.open("rb", buffering=0) as file:
                    file.seek(part.start + skip * out.element_size())
                    read = _read_all(file.fileno(), _bytes(target))
        if read != target.nbytes:
            raise CheckpointError(f"{path} is cut short: {target.nbytes - read:,} bytes of it are missing")
        if target is not out:
            out.copy_(target)


def _read_all(descriptor: int, into: memoryview) -> int:
    """Fill `into`; fewer bytes only where the file ends."""
    read = 0
    while read < len(into) and (count := os.readv(descriptor, [into[read:]])):
        read += count
    return read


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

    def of(self, name: str) -> list[StoredPart]:
        return self._parts.get(name, [])

    def read_into(self, out: memoryview, part: StoredPart, skip: int) -> int:
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


def _parts(metadata: _Record) -> tuple[dict[str, list[StoredPart]], dict[StoredPart, int]]:
    """Tensor name -> parts, and the bytes of each part's archive, from the records of a `Metadata`."""
    lengths = {
        (name, _first(chunk.state["offsets"])): _first(chunk.state["sizes"])
        for name, tensor in metadata.state["state_dict_metadata"].items()
        for chunk in tensor.state["chunks"]
    }
    found: dict[str, list[StoredPart]] = {}
    sizes: dict[StoredPart, int] = {}
    for index, stored in metadata.state["storage_data"].items():
        name, offset, where = index.state["fqn"], _first(index.state["offset"]), stored.state
        file = str(where["relative_path"])
        if Path(file).name != file:
            raise CheckpointError(f"names the file {file!r}, which is not one of its folder")
        part = StoredPart(offset, lengths[name, offset], file, int(where["offset"]))
        found.setdefault(name, []).append(part)
        sizes[part] = int(where["length"])
    return found, sizes


def _first(size: _Record) -> int:
    """The number in a `torch.Size` of one dimension."""
    return int(size.args[0][0])


def refuse_emulated(tree: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError if the run in `folder`, whose run file is `tree`, had its compute emulated."""
    if "compute" in tree:
        raise CheckpointError(
            f"{folder} holds a run whose compute was emulated ([compute] in its run.toml): nothing was trained there, and "
            f"there is no model; give the folder of a real run"
        )


def newest_whole(folder: Path, *, step: int | None = None, verify: bool = True) -> tuple[Path, Manifest]:
    """The newest checkpoint in `folder` that is whole (or that of `step`); `verify`: by digests, not only by sizes.

    Raises CheckpointError if there is none, or if one cannot be read.
    """
    there = list_checkpoints(folder)
    if step is not None:
        chosen = [path for path in there if step_of(path) == step]
        if not chosen:
            known = ", ".join(str(step_of(path)) for path in there) or "none"
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; there are: {known}")
        return chosen[0], open_checkpoint(chosen[0], digests=verify)
    wrong = ""
    for path in reversed(there):
        try:
            return path, open_checkpoint(path, digests=verify)
        except UnreadableError:
            raise
        except CheckpointError as error:
            wrong = wrong or f" ({error})"
    raise CheckpointError(f"{folder} holds no checkpoint that is whole{wrong}; train first, or give another run folder")


class TensorReader:
    """The logical tensors of a checkpoint, one at a time."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._tensors = path, manifest.tensors
        self._reader = PiecesReader(path, manifest)

    def read(self, name: str) -> Tensor:
        """The full tensor `name`. Raises CheckpointError if it is not there."""
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} has no tensor {name!r}")
        info = self._tensors[name]
        dtype = getattr(torch, info.dtype.removeprefix("torch."))
        flat = torch.empty(torch.Size(info.shape).numel(), dtype=dtype)
        self._reader.fill([Piece(name, info.shape, 0, flat)])
        return flat.view(info.shape)


def read_tensors(path: Path, manifest: Manifest, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name without `prefix`, tensor) for every logical tensor under `prefix`, in the order of saving."""
    reader = TensorReader(path, manifest)
    for name in manifest.tensors:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), reader.read(name)
