"""Reading a checkpoint outside training: one process, no world, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from thinwire.checkpoint.manifest import Manifest
from thinwire.checkpoint.pieces_io import PiecesReader, read_pieces
from thinwire.checkpoint.store import list_checkpoints, open_checkpoint
from thinwire.errors import CheckpointError
from thinwire.partition.pieces import Piece


def newest_whole(folder: Path, *, step: int | None = None) -> tuple[Path, Manifest]:
    """The newest checkpoint in `folder` that is whole (or that of `step`). Raises CheckpointError if there is none."""
    there = list_checkpoints(folder)
    if step is not None:
        chosen = [path for path in there if path.name.endswith(f"{step:08d}")]
        if not chosen:
            known = ", ".join(str(int(path.name[5:])) for path in there) or "none"
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; there are: {known}")
        return chosen[0], open_checkpoint(chosen[0], digests=True)
    wrong = ""
    for path in reversed(there):
        try:
            return path, open_checkpoint(path, digests=True)
        except CheckpointError as error:
            wrong = f" ({error})"
    raise CheckpointError(f"{folder} holds no checkpoint that is whole{wrong}; train first, or give another run folder")


class TensorReader:
    """The logical tensors of a checkpoint, one at a time."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._tensors = path, manifest.tensors
        self._reader = PiecesReader(path)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`. Raises CheckpointError if it is not there."""
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} has no tensor {name!r}")
        info = self._tensors[name]
        dtype = getattr(torch, info.dtype.removeprefix("torch."))
        flat = torch.empty(torch.Size(info.shape).numel(), dtype=dtype)
        read_pieces(self._path, [Piece(name, info.shape, 0, flat)], reader=self._reader)
        return flat.view(info.shape)


def read_tensors(path: Path, manifest: Manifest, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name without `prefix`, tensor) for every logical tensor under `prefix`, in the order of saving."""
    reader = TensorReader(path, manifest)
    for name in manifest.tensors:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), reader.read(name)
