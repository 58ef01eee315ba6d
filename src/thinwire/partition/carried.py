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

from thinwire.partition.pieces import Piece
from thinwire.partition.place import Place
from thinwire.partition.sums import Sums

_RESIDUAL = "carried/residual/"


def to_save(sums: Sums) -> list[Piece]:
    """What this rank writes of `sums`; nothing before the first step."""
    if sums.feedback_level is None or sums.residual.value is None:
        return []
    member, _ = _member(sums.place, sums.feedback_level)
    starts = list(_starts(sums)) if member == 0 else []
    return [*_residual(sums, member, sums.residual.value), *starts]


def to_load(sums: Sums, saved: Collection[str]) -> list[Piece]:
    """What this rank reads of the tensors named in `saved`; call `sums.residual.arrived()` when they are filled."""
    if sums.feedback_level is None:
        return []
    mine, members = _member(sums.place, sums.feedback_level)
    numbers = {int(name.removeprefix(_RESIDUAL).partition("/")[0]) for name in saved if name.startswith(_RESIDUAL)}
    pieces = list(_starts(sums))
    for member in sorted(number for number in numbers if number % members == mine):
        room = sums.residual.arriving(len(sums.place.at(sums.feedback_level - 1)), sums.place.device)
        pieces += _residual(sums, member, room)
    return [piece for piece in pieces if piece.name in saved]


def _member(place: Place, level: int) -> tuple[int, int]:
    """(number of the member that this rank's message at `level` belongs to, how many there are)."""
    levels, coordinates = place.world.cluster.levels[level:], place.world.cluster.coordinates(place.world.rank)[level:]
    number = 0
    for joined, coordinate in zip(reversed(levels), reversed(coordinates), strict=True):
        number = number * joined.fanout + coordinate
    return number, math.prod(joined.fanout for joined in levels)


def _residual(sums: Sums, member: int, values: Tensor) -> list[Piece]:
    assert sums.feedback_level is not None
    return [
        Piece(f"{_RESIDUAL}{member}/{name}", shape, offset, values[where])
        for name, shape, offset, where in sums.place.parts(sums.feedback_level - 1)
    ]


def _starts(sums: Sums) -> Iterator[Piece]:
    """The Q of every matrix of a low-rank sum, under a name that says whose rows it belongs to."""
    if sums.low_rank is None:
        return
    first = sums.place.at(sums.low_rank.level - 1).start
    for matrix, q in sums.low_rank.started:
        slot = next(slot for slot in sums.place.layout.slots if first + matrix.start < slot.offset + slot.numel)
        row = (first + matrix.start - slot.offset) // matrix.columns
        name = f"carried/q/{q.shape[1]}/{slot.name}/{row}-{matrix.rows}"
        yield Piece(name, tuple(q.shape), 0, q.view(-1))
