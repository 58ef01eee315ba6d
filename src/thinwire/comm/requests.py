"""Collectives that are asked for: what moves states asks for its hops, and the driver (`comm/driver.py`) issues them.

Shapes: k ranks of the group, n elements of one rank's chunk
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thinwire.comm.codecs.codec import IDENTITY, Codec
from thinwire.comm.handle import Handle
from thinwire.comm.world import World


@dataclass(eq=False)
class Gather:
    """An all-gather: the arguments of `collectives.all_gather`."""

    out: Tensor
    shard: Tensor
    world: World
    level: int
    purpose: str
    codec: Codec = IDENTITY
    seed: int = 0
    add: bool = False
    tag: int = 0
    lasting: bool = False
    bucket_bytes: int = 0
    """Up to this size it travels together with others of its kind."""

    @property
    def key(self) -> Hashable:
        """Requests of one key may travel as one message."""
        small = self.out.nbytes <= self.bucket_bytes
        return ("gather", self.level, self.purpose, self.tag, self.lasting) if small else id(self)


@dataclass(eq=False)
class Reduce:
    """A reduce-scatter: the arguments of `collectives.reduce_scatter`."""

    out: Tensor
    full: Tensor | list[Tensor]
    world: World
    level: int
    purpose: str
    codec: Codec = IDENTITY
    seed: int = 0
    tag: int = 0
    bucket_bytes: int = 0

    @property
    def pieces(self) -> list[Tensor]:
        return [self.full] if isinstance(self.full, Tensor) else self.full

    @property
    def key(self) -> Hashable:
        """Requests of one key may travel as one message."""
        small = sum(piece.nbytes for piece in self.pieces) <= self.bucket_bytes
        form: Any = (self.out.dtype, self.pieces[0].dtype) if self.codec is IDENTITY else "coded"
        return ("reduce", self.level, self.purpose, self.tag, form) if small else id(self)

    def let_go(self) -> None:
        """It is issued: whoever carries it out keeps what is still needed, and no longer than that."""
        if isinstance(self.full, list):
            self.full.clear()


Request = Gather | Reduce
Hops = Iterator[Handle | Request]
"""A collective of several hops: it asks for each when the one before has arrived, or yields it issued."""


def all_reduce_hops(message_m: Tensor, *, world: World, level: int, purposes: tuple[str, str]) -> Hops:
    """Sum `message_m` in place, m a multiple of the group's ranks: asks for its two hops.

    An empty message has its hops too, without bytes: ranks whose message is empty go on hop by hop with the others.
    """
    reducing, gathering = purposes
    if message_m.numel():
        shard = message_m.new_empty(message_m.numel() // world.fanout(level))
        yield Reduce(shard, message_m, world, level, reducing)
        yield Gather(message_m, shard, world, level, gathering)
        return
    for kind, purpose in zip(("reduce_scatter", "all_gather"), purposes, strict=True):
        entry = world.ledger.open(
            level=world.level_name(level), kind=kind, purpose=purpose, payload_bytes=0, sent_bytes=0, codec="identity"
        )
        yield Handle(world.outstanding, entry, [])
