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


@dataclass(frozen=True)
class Share:
    """Elements start .. start + len(master) of the canonical order (all trained parameters, back to back)."""

    unit: int
    unit_name: str
    start: int
    master: Tensor
    """(length,) a view into the live masters."""
    parts: tuple[tuple[str, tuple[int, ...], int, slice], ...]
    """The parameters met: name, shape, offset of the first element in the parameter, and where in `master`."""

    def pieces(self, prefix: str, values: Tensor) -> list[Piece]:
        """`values` (as long as `master`) as pieces of tensors named `prefix` and the parameter's name."""
        return [Piece(prefix + name, shape, offset, values[where]) for name, shape, offset, where in self.parts]
