"""Pieces in files: every rank writes one, in the layout of safetensors, and the manifest says where which elements lie.

The layout: eight bytes with the length of a JSON header, the header, then elements back to back. It is written and read
here, not by the library: so nothing is copied, only the bytes that a rank needs are read, and a disk that fails is an
error with a sentence (the library maps files into memory, where it is a SIGBUS). A test opens the files with the library.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.checkpoint.manifest import OLD_FORMAT, FileInfo, Manifest, Part, reading
from thinwire.checkpoint.old_format import OldParts
from thinwire.errors import CheckpointError
from thinwire.partition.pieces import Piece

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNED = 8


def write_pieces(path: Path, pieces: Sequence[Piece]) -> tuple[FileInfo, list[Part]]:
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
    parts = [Part(p.offset, p.tensor.numel(), path.name, first + starts[i]) for i, p in enumerate(pieces)]
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

    def _read(self, part: Part, skip: int, out: Tensor) -> None:
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
