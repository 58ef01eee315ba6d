"""All legal cuts, and what training under one of them gives, for tests that compare cuts."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded
from thinwire.train.announce import predicted_bytes

Depths = tuple[int, int, int]
Bytes = dict[str, dict[str, int]]


class Trained(NamedTuple):
    """What a training gave."""

    seen: Any
    """Losses, norms, hashes: whatever has to be equal."""
    sent: Bytes
    """level -> purpose -> bytes that this rank sent, control messages left out."""


def cuts_of(levels: int, *, frozen_weights: bool = False) -> Iterator[Depths]:
    """Every legal (lp, lg, lo) on so many levels."""
    for lp, lg, lo in itertools.product(range(-1, levels), repeat=3):
        if lg <= lo and lp <= lo and (frozen_weights or lp <= lg):
            yield lp, lg, lo


def sent(world: World) -> Bytes:
    """What this rank sent since the ledger was drained, control messages left out; drains it."""
    counted = world.ledger.drain().sent_bytes()
    plain = {
        level: {purpose: count for purpose, count in purposes.items() if purpose != "control"}
        for level, purposes in counted.items()
    }
    return {level: purposes for level, purposes in plain.items() if purposes}


def formula(engine: Sharded, steps: int) -> Bytes:
    """The formula's bytes of so many steps."""
    of_step = predicted_bytes(engine)
    return {level: {what: steps * count for what, count in purposes.items()} for level, purposes in of_step.items()}
