"""A rank's part of a logical tensor: what checkpoints hold, so that any partition loads any other's."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements offset .. offset + len(tensor) of the flattened logical tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: Tensor
    """(length,) contiguous; a view into live storage, so that loading fills it in place."""
