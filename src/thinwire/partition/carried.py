"""What a step takes over from the one before, beside masters and optimizer states, as pieces of logical tensors.

    carried/residual/G/NAME        what the ranks of member G have not sent yet of their gradients of parameter NAME;
                                   G counts the members outside the hop that is coded with error feedback
    carried/q/RANK/NAME/ROW-ROWS   the matrix from which low-rank sums of these rows of NAME start

A saved member's residual goes to the member of the same number, or, where there are fewer now, to G modulo their number:
what was put in is still sent, whole. A Q of rows that are cut otherwise now is not looked for: the sums start afresh.
"""

import math
from collections.abc import Collection, Iterator

from torch import Tensor

from thinwire.partition.flat import Flat
from thinwire.partition.pieces import Piece

_RESIDUAL = "carried/residual/"


def to_save(flat: Flat) -> list[Piece]:
    """What this rank writes of `flat`; nothing before the first step."""
    if flat.feedback_level is None or flat.residual.value is None:
        return []
    member, _ = _member(flat, flat.feedback_level)
    starts = list(_starts(flat)) if member == 0 else []
    return [*_residual(flat, member, flat.residual.value), *starts]


def to_load(flat: Flat, saved: Collection[str]) -> list[Piece]:
    """What this rank reads of the tensors named in `saved`; call `flat.residual.arrived()` when they are filled."""
    if flat.feedback_level is None:
        return []
    mine, members = _member(flat, flat.feedback_level)
    numbers = {int(name.removeprefix(_RESIDUAL).partition("/")[0]) for name in saved if name.startswith(_RESIDUAL)}
    pieces = list(_starts(flat))
    for member in sorted(number for number in numbers if number % members == mine):
        room = flat.residual.arriving(len(flat.at(flat.feedback_level - 1)), flat.master.device)
        pieces += _residual(flat, member, room)
    return [piece for piece in pieces if piece.name in saved]


def _member(flat: Flat, level: int) -> tuple[int, int]:
    """(number of the member that this rank's message at `level` belongs to, how many there are)."""
    levels, coordinates = flat.world.cluster.levels[level:], flat.world.cluster.coordinates(flat.world.rank)[level:]
    number = 0
    for joined, coordinate in zip(reversed(levels), reversed(coordinates), strict=True):
        number = number * joined.fanout + coordinate
    return number, math.prod(joined.fanout for joined in levels)


def _residual(flat: Flat, member: int, values: Tensor) -> list[Piece]:
    made: list[Piece] = []
    assert flat.feedback_level is not None
    flat.parts(
        lambda name, shape, offset, where: made.append(
            Piece(f"{_RESIDUAL}{member}/{name}", shape, offset, values[where])
        ),
        depth=flat.feedback_level - 1,
    )
    return made


def _starts(flat: Flat) -> Iterator[Piece]:
    """The Q of every matrix of a low-rank sum, under a name that says whose rows it belongs to."""
    if flat.low_rank is None:
        return
    first = flat.at(flat.low_rank.level - 1).start
    for matrix, q in flat.low_rank.started:
        slot = next(slot for slot in flat.layout.slots if first + matrix.start < slot.offset + slot.numel)
        row = (first + matrix.start - slot.offset) // matrix.columns
        name = f"carried/q/{q.shape[1]}/{slot.name}/{row}-{matrix.rows}"
        yield Piece(name, tuple(q.shape), 0, q.view(-1))
