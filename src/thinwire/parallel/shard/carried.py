"""What a step takes over from the one before, beside masters and optimizer states, as pieces of logical tensors.

    carried/residual/G/NAME        what the ranks of member G have not sent yet of their gradients of parameter NAME;
                                   G counts the members outside the hop that is coded with error feedback
    carried/q/RANK/NAME/ROW-ROWS   the matrix from which low-rank sums of these rows of NAME start
    carried/seed/KEY/NAME          the seed with which compressed weights were sent last, of the buffer that begins with NAME
    carried/weights/KEY/NAME       compressed weights themselves, where masters and a seed do not give them again

A saved member's residual goes to the member of the same number, or, where there are fewer now, to G modulo their number:
what was put in is still sent, whole. A Q of rows that are sharded otherwise now is not looked for: the sums start afresh.
So do compressed weights, from their masters, where KEY is another (`thinwire.parallel.shard.flat`).

Nothing is saved of a buffer's padding: what it has of a residual stands for no parameter, and is dropped every step.
"""

import math
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from thinwire.parallel.shard.accumulation import GradAccumulation
from thinwire.parallel.shard.flat import Flat
from thinwire.parallel.shard.layout import Piece
from thinwire.parallel.shard.shard_spec import ShardSpec
from thinwire.parallel.shard.unit import Unit

_RESIDUAL, _SEED, _WEIGHTS = "carried/residual/", "carried/seed/", "carried/weights/"


def to_save(unit: Unit) -> list[Piece]:
    """What this rank writes of a unit."""
    return [
        piece
        for flat in unit.flats
        for piece in [*(_grads_to_save(unit.grads[flat]) if flat.trained else ()), *_received_to_save(flat)]
    ]


def to_load(unit: Unit, saved: Collection[str]) -> list[Piece]:
    """What this rank reads, of a unit, of the tensors named in `saved`. Fill them, then call `arrived`."""
    return [
        piece
        for flat in unit.flats
        for piece in [
            *(_grads_to_load(unit.grads[flat], saved) if flat.trained else ()),
            *_received_to_load(flat, saved),
        ]
    ]


def arrived(unit: Unit) -> None:
    """The pieces of `to_load` are filled: what they hold counts from now on."""
    for grads in unit.grads.values():
        grads.residual.arrived()
    for flat in unit.flats:
        flat.received.arrived()


def starts_afresh(flats: Iterable[Flat], saved: Collection[str]) -> bool:
    """Whether compressed weights begin with their masters' values, or are not compressed as they were."""
    compressed = [flat for flat in flats if flat.received.compressed]
    if not compressed:
        return any(name.startswith((_SEED, _WEIGHTS)) for name in saved)
    return not all(_seed(flat) in saved or _all_weights(flat) <= set(saved) for flat in compressed)


def _grads_to_save(grads: GradAccumulation) -> list[Piece]:
    """Nothing before the first step."""
    if grads.feedback_level is None or grads.residual.value is None:
        return []
    member, _ = _member(grads.spec, grads.feedback_level)
    starts = list(_starts(grads)) if member == 0 else []
    return [*_residual(grads, member, grads.residual.value), *starts]


def _grads_to_load(grads: GradAccumulation, saved: Collection[str]) -> list[Piece]:
    if grads.feedback_level is None:
        return []
    mine, members = _member(grads.spec, grads.feedback_level)
    numbers = {int(name.removeprefix(_RESIDUAL).partition("/")[0]) for name in saved if name.startswith(_RESIDUAL)}
    pieces = list(_starts(grads))
    for member in sorted(number for number in numbers if number % members == mine):
        room = grads.residual.arriving(len(grads.spec.at(grads.feedback_level - 1)), grads.spec.device)
        pieces += _residual(grads, member, room)
    return [piece for piece in pieces if piece.name in saved]


def _received_to_save(flat: Flat) -> list[Piece]:
    received, lo = flat.received, flat.sharding.lo
    if received.compressed and received.sent is not None and flat.spec.world.rank == 0:
        return [Piece(_seed(flat), (2,), 0, received.record())]
    if received.compressed and received.sent is None and flat.spec.first_replica(lo):
        return _weights(flat, lo, flat.weights[flat.spec.within(lo, flat.sharding.lp)])
    return []


def _received_to_load(flat: Flat, saved: Collection[str]) -> list[Piece]:
    received = flat.received
    if received.compressed and _seed(flat) in saved:
        return [Piece(_seed(flat), (2,), 0, received.arriving())]
    if received.compressed and _all_weights(flat) <= set(saved):
        received.bring_back(None)
        return _weights(flat, flat.sharding.lp, flat.weights)
    return []


def _seed(flat: Flat) -> str:
    return f"{_SEED}{flat.received.key}/{flat.spec.layout.slots[0].name}"


def _all_weights(flat: Flat) -> set[str]:
    """Names of all weights of a buffer, also of those that are not on this rank."""
    return {f"{_WEIGHTS}{flat.received.key}/{slot.name}" for slot in flat.spec.layout.slots if slot.numel}


def _weights(flat: Flat, depth: int, values: Tensor) -> list[Piece]:
    return [
        Piece(f"{_WEIGHTS}{flat.received.key}/{name}", shape, offset, values[where])
        for name, shape, offset, where in flat.spec.parts(depth)
    ]


def _member(spec: ShardSpec, level: int) -> tuple[int, int]:
    """(number of the member that this rank's message at `level` belongs to, how many there are)."""
    levels, coordinates = spec.world.cluster.levels[level:], spec.world.cluster.coordinates(spec.world.rank)[level:]
    number = 0
    for joined, coordinate in zip(reversed(levels), reversed(coordinates), strict=True):
        number = number * joined.fanout + coordinate
    return number, math.prod(joined.fanout for joined in levels)


def _residual(grads: GradAccumulation, member: int, values: Tensor) -> list[Piece]:
    assert grads.feedback_level is not None
    return [
        Piece(f"{_RESIDUAL}{member}/{name}", shape, offset, values[where])
        for name, shape, offset, where in grads.spec.parts(grads.feedback_level - 1)
    ]


def _starts(grads: GradAccumulation) -> Iterator[Piece]:
    """The Q of every matrix of a low-rank sum, under a name that says whose rows it belongs to."""
    if grads.low_rank is None:
        return
    first = grads.spec.at(grads.low_rank.level - 1).start
    for matrix, q in grads.low_rank.started:
        slot = next(slot for slot in grads.spec.layout.slots if first + matrix.start < slot.offset + slot.numel)
        row = (first + matrix.start - slot.offset) // matrix.columns
        name = f"carried/q/{q.shape[1]}/{slot.name}/{row}-{matrix.rows}"
        yield Piece(name, tuple(q.shape), 0, q.view(-1))
