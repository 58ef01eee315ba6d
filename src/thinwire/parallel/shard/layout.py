"""Where parameters lie in a unit's flat buffer, and which interval of it a rank holds at each depth. Pure.

Shards are inner-major: at depth d (sharded over levels 0..d) a rank with coordinates c holds the interval that starts at
sum over l <= d of c_l N / S_l and has N / S_d elements, where S_d is the product of the fanouts up to d. So a
reduce-scatter of level d takes the interval of depth d - 1 to that of depth d, an all-gather takes it back, and no
element is ever moved to another place. Depth -1 is the whole buffer.

A rank's part of a logical tensor: what checkpoints hold, so that any partition loads any other's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One parameter in the buffer: elements offset .. offset + numel."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Parameters back to back, padded so that every rank's interval has the same length."""

    slots: tuple[Slot, ...]
    numel: int
    """Elements with padding: a multiple of the world's ranks and of the codecs' block."""

    @cached_property
    def used(self) -> int:
        """Elements without padding."""
        return self.slots[-1].offset + self.slots[-1].numel if self.slots else 0

    @staticmethod
    def of(named_shapes: Sequence[tuple[str, tuple[int, ...]]], *, multiple: int) -> "Layout":
        """Lay `named_shapes` out in order; the length is rounded up to a multiple of `multiple`."""
        slots, offset = [], 0
        for name, shape in named_shapes:
            slots.append(Slot(name, shape, offset))
            offset += slots[-1].numel
        return Layout(tuple(slots), -(-offset // multiple) * multiple)


@dataclass(frozen=True)
class Interval:
    """Elements start .. end of a flat buffer."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def meet(self, slot: Slot) -> "Interval":
        """The part of `slot` inside this interval, in the buffer's own count; empty intervals have start == end."""
        start = min(max(self.start, slot.offset), self.end)
        return Interval(start, max(start, min(self.end, slot.offset + slot.numel)))

    def inside(self, outer: "Interval") -> slice:
        """This interval as a slice of the buffer that holds `outer`."""
        assert outer.start <= self.start <= self.end <= outer.end
        return slice(self.start - outer.start, self.end - outer.start)


def matrices_in(layout: Layout, part: Interval, rank: int) -> list[tuple[int, int, int]]:
    """(start in the part, rows, columns) of whole rows of matrices that rank x (rows + columns) numbers can stand for.

    A parameter's first dimension counts rows, all others columns. Of a matrix that is sharded only its whole rows count.
    """
    found = []
    for slot in layout.slots:
        met, columns = part.meet(slot), math.prod(slot.shape[1:])
        if len(slot.shape) < 2 or not len(met):
            continue
        first, last = -(-(met.start - slot.offset) // columns), (met.end - slot.offset) // columns
        rows = last - first
        if rows > 0 and rank * (rows + columns) < rows * columns:
            found.append((slot.offset + first * columns - part.start, rows, columns))
    return found


def interval(numel: int, fanouts: Sequence[int], coordinates: Sequence[int], depth: int) -> Interval:
    """What the rank at `coordinates` holds of `numel` elements when they are sharded over levels 0..`depth`."""
    start, size = 0, numel
    for fanout, coordinate in zip(fanouts[: depth + 1], coordinates[: depth + 1], strict=True):
        assert size % fanout == 0, (numel, fanouts)
        size //= fanout
        start += coordinate * size
    return Interval(start, start + size)


@dataclass(frozen=True)
class BufferInfo:
    """A flat buffer of the `unit`-th unit, its precision on masters, and whether it is trained."""

    unit: int
    layout: Layout
    master: torch.dtype
    trained: bool


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
