"""What others read and write of a sharded module: the optimizer, checkpoints, and replicas that synchronise."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.parallel.shard.accumulation import GradAccumulation
from thinwire.parallel.shard.dtypes import norm_of
from thinwire.parallel.shard.guard import NoGradients
from thinwire.parallel.shard.layout import BufferInfo, Piece, Share
from thinwire.parallel.shard.optimizer import Owned
from thinwire.parallel.shard.unit import Unit, described
from thinwire.plan import operations
from thinwire.plan.hops import bucket_bytes
from thinwire.plan.operations import Program
from thinwire.plan.plan import Plan
from thinwire.plan.program import StepShape, Where, program


class ShardedStates(ABC):
    """The states of `units`, sharded as `plan` says, in the model's canonical order."""

    def __init__(self, units: Sequence[Unit], plan: Plan, world: World) -> None:
        self.units, self.plan, self.world = list(units), plan, world
        self._grads = [grads for unit in self.units for grads in unit.grads.values()]
        """The gradient accumulation buffers of all trained flat buffers."""
        self._no_gradients = NoGradients(self._grads, world)
        suits = bucket_bytes(sum(unit.nbytes for unit in self.units), world.links)
        self.bucket_bytes = suits if plan.bucket_bytes is None else plan.bucket_bytes
        """Up to this size units travel together."""
        for unit in self.units:
            for flat in unit.flats:
                flat.spec.bucket_bytes = self.bucket_bytes

    @abstractmethod
    def drain(self) -> None:
        """Land everything in flight."""

    def program(
        self, step: int | None = None, *, inside: Callable[[operations.Unit], operations.Unit] = lambda unit: unit
    ) -> Program:
        """What a rank does in an optimizer step that trains all units in their order, outer rounds left out.

        Steps are counted from 0; without one, it is any step after those that send more in the beginning. An axis that
        sends activations says with `inside` what of a unit's forward and backward that is.
        """
        plan = self.plan
        step = plan.compression.whole_steps if step is None else step
        units = [inside(described(unit, step)) for unit in self.units]
        lp, _, lo = plan.depths
        halves = self.world.device.type == "cpu"
        where = Where(self.world.links, halves=halves, bucket_bytes=self.bucket_bytes)
        return program(StepShape(plan.accumulate, plan.partition.keep_gathered, lp=lp, lo=lo), [[units]], where)

    def grad_norm(self) -> float:
        """Global 2-norm of the summed gradient, every logical element counted once; the same on all ranks.

        Rounded to the gradients' precision, so that it does not depend on how the sum was sharded.
        """
        own = sum(grads.squares() for grads in self._grads)
        total = torch.tensor([own], dtype=torch.float64)
        all_reduce_small(total, world=self.world, op="sum", levels=range(self.plan.depths[2] + 1))
        return norm_of(total.item(), {grads.dtype for grads in self._grads})

    def owned(self) -> list[Owned]:
        """This rank's trained masters, for the optimizer."""
        return [
            Owned(name, shape, offset, flat.master[where], partial(self._grad_of, grads, name, where))
            for unit in self.units
            for flat, grads in unit.grads.items()
            for name, shape, offset, where in flat.spec.parts(flat.sharding.lo)
        ]

    def _grad_of(self, grads: GradAccumulation, name: str, where: slice) -> Tensor | None:
        return None if name in self._no_gradients.names else grads.reduced_at(where)

    def shares(self, *, trained: bool = True) -> list[Share]:
        """What this rank alone stands for of every trained (or every frozen) flat buffer, in the model's canonical order."""
        found, base = [], 0
        for index, unit in enumerate(self.units):
            for flat in (flat for flat in unit.flats if flat.trained == trained):
                first, view = flat.share()
                named = tuple(flat.spec.parts(flat.spec.outermost))
                found.append(Share(index, unit.label, base + first, view, named))
                base += flat.layout.used
        return found

    def buffers(self) -> list[BufferInfo]:
        """All flat buffers, in the model's canonical order."""
        return [
            BufferInfo(index, flat.layout, flat.master.dtype, flat.trained)
            for index, unit in enumerate(self.units)
            for flat in unit.flats
        ]

    def as_received(self) -> Callable[[], None]:
        """To be called once the masters are again what they are now, and before they set out: weights that had been sent
        compressed then come back with the bits that they have now."""
        now = [(flat.received, *flat.received.kept()) for unit in self.units for flat in unit.flats]

        def bring_back() -> None:
            for received, sent, weights in now:
                received.bring_back(sent, weights)

        return bring_back

    def saves(self, owned: Owned) -> bool:
        """Whether this rank writes what it owns: of equal replicas only the first does."""
        return self._first_replica()

    def for_save(self, *, trained_only: bool = False) -> list[Piece]:
        """The pieces of the model's (or only its trained) parameters that this rank is to write. Lands what is in flight."""
        self.drain()
        return self.for_load(trained_only=trained_only) if self._first_replica() else []

    def for_load(self, *, trained_only: bool = False) -> list[Piece]:
        """Every piece that this rank holds; fill them, then call `loaded`."""
        flats = [flat for unit in self.units for flat in unit.flats]
        return [piece for flat in flats if flat.trained or not trained_only for piece in flat.pieces()]

    def _first_replica(self) -> bool:
        outer = self.world.cluster.coordinates(self.world.rank)[self.plan.depths[2] + 1 :]
        return not any(outer)
