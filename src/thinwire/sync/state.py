"""A run of worker groups as logical tensors, also in the middle of a round.

    params/NAME               the outer weights: what evaluation, generation and export read, and any plan goes on from
    optimizer.KEY/NAME        the optimizer states of group 0, as does carried/... what its coded gradients carry over
    outer/momentum/NAME       outer momentum
    outer/pending/NAME        what the groups agreed on and is not applied yet, of the fragments in flight
    outer/counted             whose contributions that holds, for eager updates
    groups/G/...              what group G alone has: its own weights, its optimizer states and carried/... (G > 0), the
                              residual of error feedback, the tokens since its last sends, its count of optimizer steps,
                              of which it may have skipped others; for eager updates its outer state too

A checkpoint of another plan lacks some of these; then every group starts from the outer weights and group 0's states.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

import torch

from thinwire.parallel.shard.layout import Piece
from thinwire.sync.outer_sync import OuterSync


def to_save(sync: OuterSync, inner: Sequence[Piece], optimizer: Sequence[Piece], *, updates: int) -> list[Piece]:
    """What this rank writes; `inner` and `optimizer` are its group's own pieces. Lands what is in flight.

    `updates`: optimizer steps that its group has taken.
    """
    sync.drain()
    trained = _trained(sync)
    own = [piece for piece in inner if piece.name.removeprefix("params/") in trained]
    pieces = [_of_group(sync, piece) for piece in own]
    if sync.group == 0:
        pieces += [piece for piece in inner if piece.name.removeprefix("params/") not in trained]
    pieces += [piece if sync.group == 0 else _of_group(sync, piece) for piece in optimizer]
    pieces += [piece for piece in _outer(sync) if sync.group == 0 or piece.name.startswith("groups/")]
    if sync.engine.world.rank == 0:
        taken = taken_steps(sync)
        taken.tensor.fill_(updates)
        pieces += [_tokens(sync), taken]
    return pieces + ([_counted(sync)] if sync.world.rank == sync.groups[0][0] and sync.sync.own_fresh else [])


def to_load(
    sync: OuterSync, inner: Sequence[Piece], optimizer: Sequence[Piece], saved: Container[str], *, same: bool
) -> list[Piece]:
    """What this rank reads, of what is there. `same`: whether the checkpoint's rounds are this plan's.

    Only then is what was in flight taken up again. Call `sync.go_on` before, `engine.loaded()` afterwards.
    """
    pieces = [_found(sync, piece, saved) for piece in (*inner, *optimizer)]
    for piece in _outer(sync):
        shared = replace(piece, name="params/" + piece.name.partition("/outer/weights/")[2])
        if piece.name in saved:
            pieces.append(piece)
        elif "/outer/weights/" in piece.name:
            pieces.append(shared)
    small = (_tokens(sync), _counted(sync)) if same else ()
    return pieces + [piece for piece in small if piece.name in saved]


def in_flight(sync: OuterSync, saved: Container[str]) -> set[int]:
    """The fragments of which a checkpoint holds an exchange in flight; a run that ended had applied all of its own."""
    return {
        number
        for number, fragment in enumerate(sync.fragments)
        if any(f"outer/pending/{name}" in saved for name in _names(sync, fragment.units))
    }


def taken_steps(sync: OuterSync) -> Piece:
    """How many optimizer steps this rank's group has taken, to be filled."""
    return Piece(f"groups/{sync.group}/updates", (1,), 0, torch.zeros(1, dtype=torch.int64))


def without_groups(saved: Iterable[str]) -> set[str]:
    """What a run without worker groups takes over of a checkpoint of such: nothing that belongs to a group's own weights."""
    return {name for name in saved if not name.startswith(("groups/", "carried/"))}


def own_names(sync: OuterSync, saved: Iterable[str]) -> set[str]:
    """The tensors in a checkpoint that this rank's group saved for itself, under the names they have inside it."""
    if sync.group == 0:
        return {name for name in saved if not name.startswith("groups/")}
    prefix = f"groups/{sync.group}/"
    return {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}


def _trained(sync: OuterSync) -> set[str]:
    """Names of the trained parameters, also those of which this rank has nothing."""
    return _names(sync, {buffer.unit for buffer in sync.engine.buffers()})


def _names(sync: OuterSync, units: Container[int]) -> set[str]:
    buffers = [buffer for buffer in sync.engine.buffers() if buffer.trained and buffer.unit in units]
    return {slot.name for buffer in buffers for slot in buffer.layout.slots}


def _outer(sync: OuterSync) -> list[Piece]:
    """The outer state of this rank, under the names it has in its group."""
    eager, group = sync.sync.own_fresh, f"groups/{sync.group}/"
    shared = f"{group}outer/" if eager and sync.group > 0 else "outer/"
    weights = f"{group}outer/weights/" if eager and sync.group > 0 else "params/"
    pieces: list[Piece] = []
    for fragment in sync.fragments:
        pieces += fragment.pieces(weights, fragment.weights)
        pieces += fragment.pieces(f"{shared}momentum/", fragment.momentum)
        if fragment.residual is not None:
            pieces += fragment.pieces(f"{group}outer/residual/", fragment.residual)
    for pending in sync.pending:
        fragment = sync.fragments[pending.key.fragment]
        pieces += fragment.pieces("outer/pending/", pending.change)
        if eager and pending.own is not None:
            pieces += fragment.pieces(f"{group}outer/own/", pending.own)
    return pieces


def _tokens(sync: OuterSync) -> Piece:
    """Tokens since the last send of each fragment: one small tensor, written by one rank of the group."""
    return Piece(f"groups/{sync.group}/outer/tokens", tuple(sync.tokens.shape), 0, sync.tokens)


def _counted(sync: OuterSync) -> Piece:
    """The weights of what an eager update has in flight."""
    for _, weights in (counted for pending in sync.pending for counted in pending.counted):
        if weights is not sync.counted:
            sync.counted.zero_()
            sync.counted[: len(weights)] = weights
    return Piece("outer/counted", tuple(sync.counted.shape), 0, sync.counted)


def _of_group(sync: OuterSync, piece: Piece) -> Piece:
    return replace(piece, name=f"groups/{sync.group}/{piece.name}")


def _found(sync: OuterSync, piece: Piece, saved: Container[str]) -> Piece:
    own = _of_group(sync, piece)
    return own if own.name in saved else piece
