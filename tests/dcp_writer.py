"""Checkpoints of format 1, as this project wrote them through torch.distributed.checkpoint before it had its own files."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from thinwire.checkpoint.manifest import describe_files
from thinwire.comm.world import World
from thinwire.parallel.shard.layout import Piece


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
                    chunk=ChunkStorageMetadata(torch.Size([piece.offset]), torch.Size([piece.tensor.numel()])),
                    properties=TensorProperties.create_from_tensor(piece.tensor),
                    size=torch.Size([torch.Size(piece.shape).numel()]),
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


def write_format_1(world: World, folder: Path, step: int, pieces: Sequence[Piece], meta: dict[str, Any]) -> Path:
    """What `Checkpoints.save` of that time left: DCP's files and a manifest without a digest."""
    path = folder / f"step-{step:08d}"
    group = world.communicator(range(world.size), members_only=False, small=True) if world.size > 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True, thread_count=1, overwrite=True)
        planner = _SavePieces([Piece(p.name, p.shape, p.offset, p.tensor.clone()) for p in pieces])
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    if world.rank == 0:
        names = [".metadata", *(path.name for path in path.glob("__*"))]
        tensors = {piece.name: {"shape": list(piece.shape), "dtype": str(piece.tensor.dtype)} for piece in pieces}
        files = {name: asdict(info) for name, info in describe_files(path, names).items()}
        tree = {"step": step, "meta": meta, "tensors": tensors, "files": files, "format": 1}
        (path / "manifest.json").write_text(json.dumps(tree, indent=1))
    return path
