"""Sharded safetensors folders, read and written one tensor and one shard at a time.

The layout is that of Hugging Face: `model.safetensors`, or `model-00001-of-0000N.safetensors` and an index.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinwire.config import read_json
from thinwire.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPARED = 1 << 22
DEFAULT_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ShardReader:
    """The tensors of a folder. One shard is open (memory-mapped) at a time; only what is asked for is read.

    Every method raises CheckpointError for a shard that is missing, cut short or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open_name: str | None = None
        self._open: Any = None
        self._files = _index(folder) if (folder / INDEX).is_file() else self._single()
        for file in sorted(set(self._files.values())):
            if not (folder / file).is_file():
                raise CheckpointError(f"the shard {folder / file} is missing; its index names it")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`; read from the header."""
        return tuple(self._slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; each shard's header is read once."""
        return {name: self.shape(name) for name in sorted(self._files, key=lambda name: (self._files[name], name))}

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers; some million of them are in memory at a time."""
        count = torch.Size(self.shape(name)).numel()
        return self.dtype(name) == self.dtype(other) and all(
            torch.equal(self.elements(name, first, size), self.elements(other, first, size))
            for first in range(0, count, _COMPARED)
            for size in [min(_COMPARED, count - first)]
        )

    def dtype(self, name: str) -> torch.dtype:
        """Raises CheckpointError for one that is no float of 16 bits or more (quantised weights)."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(
                f"{self._folder}: {name!r} is stored as {stored}; quantised weights are not supported, only "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """The full tensor."""
        self._slice(name)
        return self._open.get_tensor(name)  # type: ignore[no-any-return]

    def elements(self, name: str, first: int, count: int) -> Tensor:
        """`count` elements of the flattened tensor from `first` on; only the rows that hold them are read."""
        stored = self._slice(name)
        shape = stored.get_shape()
        row = torch.Size(shape[1:]).numel()
        if row == 0 or count == 0:
            return torch.empty(0)
        top, bottom = first // row, -(-(first + count) // row)
        rows: Tensor = stored[top:bottom]
        return rows.reshape(-1)[first - top * row :][:count]

    def _single(self) -> dict[str, str]:
        if not (self._folder / SINGLE).is_file():
            raise CheckpointError(
                f"{self._folder} holds neither {SINGLE} nor {INDEX}; weights in other formats (pytorch_model.bin) are not "
                f"read: save them with save_pretrained of a current transformers"
            )
        self._turn_to(SINGLE)
        return dict.fromkeys(self._open.keys(), SINGLE)

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}")
        self._turn_to(self._files[name])
        try:
            return self._open.get_slice(name)
        except SafetensorError as error:
            where = self._folder / self._files[name]
            raise CheckpointError(f"{where} does not hold {name!r}, which its index places there ({error})") from None

    def _turn_to(self, file: str) -> None:
        if self._open_name == file:
            return
        self._open_name, self._open = None, None
        try:
            self._open = safe_open(self._folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file} is cut short or no safetensors file: {error}") from None
        self._open_name = file


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, by the folder's index."""
    path = folder / INDEX
    tree = read_json(path, error=CheckpointError, way_out="download the folder again")
    files = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} is no index of shards: it holds no weight_map; download the folder again")
    if not all(Path(file).name == file for file in files.values()):
        raise CheckpointError(
            f"{path} is no index of shards: a shard lies outside the folder; download the folder again"
        )
    return files


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, split into shards of at most `limit` bytes; a tensor larger than that has a shard to itself."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], *, limit: int = DEFAULT_SHARD_BYTES
) -> list[str]:
    """Write `tensors`, which come in the order of `sizes` (name -> bytes), as shards and an index: the files' names.

    No more than one shard is in memory. Raises OSError if the disk is full or cannot be written.
    """
    shards = plan_shards(sizes, limit)
    total = len(shards)
    files = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    coming: Iterator[tuple[str, Tensor]] = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        shard: dict[str, Tensor] = {}
        for name in names:
            came, tensor = next(coming)
            assert came == name and tensor.numel() * tensor.element_size() == sizes[name], (came, name)
            shard[name] = tensor.contiguous()
        _save(shard, folder / file)
    if total > 1:
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(INDEX)
    return files


def _save(shard: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
