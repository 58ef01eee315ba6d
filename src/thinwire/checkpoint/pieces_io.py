"""Pieces through torch.distributed.checkpoint: every logical tensor is stored flat, in one-dimensional chunks.

DTensor cannot describe uneven flat cuts (pytorch issue 160533), so the write and read items are made here; files,
resharding and the metadata are DCP's own.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from thinwire.errors import CheckpointError
from thinwire.partition.pieces import Piece


def write_pieces(folder: Path, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
    """Write this rank's pieces; collective over `group` (None: a world of one). Raises what DCP raises, on all ranks."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1, overwrite=True)
    with _quiet():
        dcp.save({}, storage_writer=writer, planner=_SavePieces(pieces), process_group=group, no_dist=group is None)


def read_pieces(folder: Path, pieces: Sequence[Piece], *, reader: "PiecesReader | None" = None) -> None:
    """Fill the pieces' tensors, each rank for itself. Raises CheckpointError for a tensor that is not there or differs.

    Give the same `reader` to several calls on one folder, and its metadata is read once.
    """
    with _quiet():
        dcp.load({}, storage_reader=reader or PiecesReader(folder), planner=_LoadPieces(folder, pieces), no_dist=True)


class PiecesReader(dcp.FileSystemReader):
    """DCP's reader, keeping the metadata: of a large run that is megabytes of pickle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([piece.offset]), sizes=torch.Size([piece.tensor.numel()]))


def _numel(piece: Piece) -> int:
    return torch.Size(piece.shape).numel()


class _SavePieces(DefaultSavePlanner):
    """Write items from pieces instead of from a state dict."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._pieces = {(piece.name, piece.offset): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(piece.name, torch.Size([piece.offset])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece),
                    properties=TensorProperties.create_from_tensor(piece.tensor),
                    size=torch.Size([_numel(piece)]),
                ),
            )
            for piece in self._pieces.values()
            if piece.tensor.numel()
        ]
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._pieces[index.fqn, index.offset[0]].tensor


class _LoadPieces(DefaultLoadPlanner):
    """Read items into pieces; DCP intersects the intervals."""

    def __init__(self, folder: Path, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._folder = folder
        self._pieces = {(piece.name, piece.offset): piece for piece in pieces if piece.tensor.numel()}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for piece in self._pieces.values() for item in self._reads(piece)])

    def _reads(self, piece: Piece) -> list[ReadItem]:
        stored = self._stored.get(piece.name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(
                f"{self._folder} has no tensor {piece.name!r}; it was saved by another model or optimizer"
            )
        if stored.size.numel() != _numel(piece) or stored.properties.dtype != piece.tensor.dtype:
            raise CheckpointError(
                f"{self._folder}: {piece.name!r} has {stored.size.numel():,} elements of {stored.properties.dtype}, here it "
                f"has {_numel(piece):,} of {piece.tensor.dtype}; model or precision differ"
            )
        items = create_read_items_for_chunk_list(piece.name, stored, [_chunk(piece)])
        found = sum(item.lengths.numel() for item in items)
        if found != piece.tensor.numel():
            raise CheckpointError(
                f"{self._folder}: {piece.name!r} holds {found:,} of the {piece.tensor.numel():,} elements from "
                f"{piece.offset:,} on"
            )
        return items

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        piece = self._pieces[index.fqn, index.offset[0]]
        start = read_item.dest_offsets[0]
        return piece.tensor.narrow(0, start, read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The view was filled in place."""


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP's own words kept short: no warning that no process group is there when it was told so, and of a failure that
    it wraps the first cause itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        warnings.filterwarnings("ignore", message=".*(TypedStorage|torch.distributed is disabled).*")
        try:
            yield
        except dcp.api.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, CheckpointError):
                raise cause from None
            raise CheckpointError(f"rank {rank}: {_sentence(cause)}") from error


def _sentence(error: BaseException) -> str:
    """What the operating system said, if an error in the chain came from it; else the error's first line."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
