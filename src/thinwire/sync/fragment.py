"""What a rank keeps of a fragment between rounds: its part of the outer weights and momentum, in host memory.

Sizes: n elements of this rank, Psi/(K F) on average. Outer weights and momentum take 8 n bytes, the residual of error
feedback 4 n more, for fp32 masters. On an accelerator the host tensors are pinned, and the copies of the fragment that is
due next are started one step early.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from thinwire.comm.world import World
from thinwire.parallel.shard.layout import BufferInfo, Piece, Share
from thinwire.plan.rounds import assign_units, fragment_count
from thinwire.plan.sync import Sync


class Replica(Protocol):
    """What synchronisation needs of the engine that trains a group's replica; each method as in `Sharded`."""

    @property
    def world(self) -> World: ...

    def buffers(self) -> list[BufferInfo]: ...

    def shares(self, *, trained: bool = True) -> list[Share]: ...

    def rewriting(self, units: Sequence[int], *, exact: bool = False) -> AbstractContextManager[None]: ...

    def as_received(self) -> Callable[[], None]: ...

    def drain(self) -> None: ...


class Fragment:
    """`units` of the engine, of which this rank stands for `shares`."""

    def __init__(self, units: Sequence[int], shares: Sequence[Share], *, feedback: bool) -> None:
        self.units, self.shares = list(units), list(shares)
        self.weights = self._host(torch.cat([share.master for share in shares]))
        self.momentum = torch.zeros_like(self.weights, pin_memory=self._device.type == "cuda")
        self.residual = torch.zeros_like(self.momentum) if feedback else None
        self._fetched: tuple[Tensor, Tensor] | None = None

    @property
    def _device(self) -> torch.device:
        return self.shares[0].master.device

    @property
    def numel(self) -> int:
        return self.weights.numel()

    @property
    def held_bytes(self) -> int:
        """8 n, with error feedback 12 n, for fp32 masters."""
        kept = (self.weights, self.momentum) if self.residual is None else (self.weights, self.momentum, self.residual)
        return sum(tensor.nbytes for tensor in kept)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Its elements in the canonical order."""
        return [(share.start, share.start + share.master.numel()) for share in self.shares if share.master.numel()]

    def _host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return host.copy_(tensor)

    def fetch(self) -> None:
        """Start copying the outer state to the device."""
        if self._fetched is None:
            weights, momentum = (x.to(self._device, non_blocking=True) for x in (self.weights, self.momentum))
            self._fetched = weights, momentum

    def take(self) -> tuple[Tensor, Tensor]:
        """(outer weights, momentum) on the device; on a CPU the state itself."""
        self.fetch()
        assert self._fetched is not None
        fetched, self._fetched = self._fetched, None
        return fetched

    def put(self, weights: Tensor, momentum: Tensor) -> None:
        """Keep the new outer state."""
        for kept, new in ((self.weights, weights), (self.momentum, momentum)):
            if kept is not new:
                kept.copy_(new)
        self._fetched = None

    def change(self) -> Tensor:
        """Outer weights minus the group's own: what the inner steps did, uphill like a gradient."""
        weights, _ = self.take()
        own = torch.cat([share.master for share in self.shares])
        return torch.sub(weights, own, out=own)

    def split(self, values: Tensor) -> list[Tensor]:
        """`values` of all n elements, share by share."""
        sizes = [share.master.numel() for share in self.shares]
        return list(torch.split(values, sizes))

    def pieces(self, prefix: str, values: Tensor) -> list[Piece]:
        """`values` of all n elements as pieces of logical tensors."""
        pairs = zip(self.shares, self.split(values), strict=True)
        return [piece for share, part in pairs for piece in share.pieces(prefix, part)]


def make_fragments(engine: Replica, sync: Sync) -> list[Fragment]:
    """The fragments of the trained units, assigned as `sync` says. Raises PlanError if there are fewer units."""
    shares = engine.shares()
    used = Counter[int]()
    for buffer in engine.buffers():
        used[buffer.unit] += buffer.layout.used if buffer.trained else 0
    units = {share.unit: (share.unit_name, used[share.unit]) for share in shares}
    blocks = sum(name.rpartition(".")[2].isdigit() for name, _ in units.values())
    indices = list(units)
    assigned = assign_units(list(units.values()), fragment_count(sync.fragments, blocks), sync.order)
    chosen = [[indices[position] for position in positions] for positions in assigned]
    return [
        Fragment(own, [share for share in shares if share.unit in own], feedback=sync.error_feedback) for own in chosen
    ]
