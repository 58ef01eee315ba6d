"""Checkpoints in memory: what all ranks would write, put together, and read again. For tests of what is saved."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.checkpoint.store import Spans, complete
from thinwire.comm.world import World
from thinwire.parallel.shard.layout import Piece


def put_together(world: World, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The logical tensors of which every rank wrote some pieces, flat. Raises if an element is not written once."""
    mine = [(piece.name, piece.shape, piece.offset, piece.tensor.dtype, _bytes(piece.tensor)) for piece in pieces]
    written: list[list[tuple[str, tuple[int, ...], int, torch.dtype, bytes]]] = [[]] * world.size
    dist.all_gather_object(written, mine)
    spans: list[Spans] = [{} for _ in written]
    whole: dict[str, Tensor] = {}
    for of_rank, parts in zip(spans, written, strict=True):
        for name, shape, offset, dtype, held in parts:
            tensor = torch.frombuffer(bytearray(held), dtype=dtype) if held else torch.empty(0, dtype=dtype)
            of_rank.setdefault(name, (shape, str(tensor.dtype), []))[2].append((offset, tensor.numel()))
            size = torch.Size(shape).numel()
            whole.setdefault(name, torch.empty(size, dtype=tensor.dtype))[offset : offset + tensor.numel()] = tensor
    complete(spans)
    return whole


def _bytes(tensor: Tensor) -> bytes:
    """Of what it holds: many small tensors take torch milliseconds each to send as they are."""
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def fill(pieces: Sequence[Piece], saved: dict[str, Tensor]) -> None:
    """Read the pieces."""
    for piece in pieces:
        stored = saved[piece.name]
        assert stored.dtype == piece.tensor.dtype, piece.name
        assert stored.numel() == torch.Size(piece.shape).numel(), piece.name
        piece.tensor.copy_(stored[piece.offset : piece.offset + piece.tensor.numel()])
