"""Reading a checkpoint outside training: one process, no world, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from thinwire.checkpoint.listing import list_checkpoints, open_checkpoint, step_of
from thinwire.checkpoint.manifest import Manifest
from thinwire.checkpoint.pieces_io import PiecesReader
from thinwire.errors import CheckpointError, UnreadableError
from thinwire.partition.pieces import Piece


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
        """The whole tensor `name`. Raises CheckpointError if it is not there."""
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
