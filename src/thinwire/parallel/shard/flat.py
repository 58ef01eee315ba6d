"""The weights of one flat buffer, sharded at depth lp, their masters at lo, and the collectives that move them.

`..._hops` are generators: each asks for a collective, and goes on when that has arrived. The engine decides when, and
issues it; this file decides what becomes of the weights, `accumulation` what becomes of the gradients. All numbers
are those of `layout`: N elements unsharded, N / S_d at depth d.

Exactness: every rank, the owner too, uses what was decoded from a message, so replicas hold the same bits.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.codecs.codec import IDENTITY
from thinwire.comm.requests import Gather
from thinwire.comm.world import World
from thinwire.errors import UseError
from thinwire.parallel.shard.deferred import FirstValues
from thinwire.parallel.shard.dtypes import Kind
from thinwire.parallel.shard.layout import Interval, Layout, Piece, Slot
from thinwire.parallel.shard.shard_spec import PLAIN, Coding, Draw, ShardSpec
from thinwire.parallel.shard.sharding import Sharding
from thinwire.plan.hops import P_GATHER, P_REFRESH, SPREAD

EXACT = Draw(0, 0)
"""Nothing was compressed."""


class Received:
    """How the weights at depth lp, `weights`, came about, and how they come back after a load, bit for bit.

    Masters are saved as they are, but a run computes with what was decoded: that takes the fewest bytes that are exact:

        exact    nothing was compressed on the way: the masters in the precision of compute. 16 bytes say so.
        sent     the latest all-gather after a step was compressed, without differences: the same all-gather of the same
                 masters with the same seed gives the same bits. 16 bytes, the seed; one more all-gather at the start.
        kept     differences (weight deltas) add up over all steps, or somebody wrote to weights: they are no function of
                 the masters. They are saved themselves: 2 or 4 bytes per parameter, in the precision of compute, each
                 element once, since all ranks that hold an element hold the same bits.

    A seed gives the same bits on the same levels, with the same sharding, codecs and buffers only: `key` is a digest of
    these, part of the names in a checkpoint. Under another key weights begin with their masters' values.
    `trained`: whether there are all-gathers after a step.
    """

    def __init__(self, spec: ShardSpec, weights: Tensor, *, trained: bool) -> None:
        self.spec, self._weights = spec, weights.data
        outside = spec.levels(spec.sharding.lp + 1, spec.sharding.lo)
        self.compressed = trained and any(level in spec.sharding.weights for level in outside)
        """Whether weights may be other than their masters."""
        self.sent: Draw | None = EXACT
        """What the latest all-gather drew; None: the weights are no function of the masters."""
        self._again = False
        self._record: Tensor | None = None

    def begins(self, *, exact: bool) -> Draw | None:
        """An all-gather of the masters begins, after a step or (`exact`) another write: what it draws.

        None: what came back from before the load is in place already, and nothing is to be sent.
        """
        again, self._again = self._again and exact, False
        if again or not self.compressed:
            return self.sent
        draw = EXACT if exact else self.spec.draw(P_REFRESH)
        self.sent = None if self.spec.sharding.delta_levels and not exact else draw
        return draw

    def edited(self) -> None:
        """Somebody wrote to weights: where they were compressed, some of them still are, others not."""
        if self.sent != EXACT:
            self.sent = None

    # -- to bring back -------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """Of all that the weights depend on beside masters and seed."""
        spec, sharding = self.spec, self.spec.sharding
        levels = [(level.name, level.fanout) for level in spec.world.cluster.levels]
        coded = [
            (level, sharding.weights[level].definition, level in sharding.delta_levels)
            for level in spec.levels(sharding.lp + 1, sharding.lo)
            if level in sharding.weights
        ]
        told = repr((levels, sharding.lp, sharding.lo, coded, spec.layout, spec.number, self._weights.dtype))
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def kept(self) -> tuple[Draw | None, Tensor | None]:
        """What brings the weights back as they are now, if the masters come back too: for `bring_back`."""
        return self.sent, self._weights.clone() if self.sent is None else None

    def bring_back(self, sent: Draw | None, weights: Tensor | None = None) -> None:
        """From the next exact all-gather of the masters on, hold what was held when `kept` said so."""
        self.sent, self._again = sent, True
        if weights is not None:
            self._weights.copy_(weights)

    def record(self) -> Tensor:
        """(2,) what `sent` is, to be saved. Only where there is one."""
        assert self.sent is not None
        return torch.tensor([self.sent.step, self.sent.number])

    def arriving(self) -> Tensor:
        """(2,) to be filled with a saved record. It counts from `arrived` on."""
        self._record = torch.zeros(2, dtype=torch.int64)
        return self._record

    def arrived(self) -> None:
        """The tensor of `arriving` is filled."""
        if self._record is not None:
            step, number = self._record.tolist()
            self.bring_back(Draw(step, number))
            self._record = None


class Flat:
    """One flat buffer of a unit. `parameters` become views of it while they are gathered.

    Gathered weights are let go of, never overwritten or taken from under somebody: a view of a parameter that outlives its
    unit's forward keeps its numbers, those of the step that it was made in, and the memory they lie in.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        kind: Kind,
        multiple: int,
        sharding: Sharding,
        world: World,
        first: FirstValues,
    ) -> None:
        self.parameters, self.sharding, self.kind = parameters, sharding, kind
        self.trained, self._device = kind.trained, next(iter(parameters.values())).device
        self.layout = Layout.of([(name, kind.shape(p.shape)) for name, p in parameters.items()], multiple=multiple)
        self.spec = ShardSpec(self.layout, sharding, world, self._device)
        self.sharded = bool(self.spec.levels(0, sharding.lp))
        """Whether weights have to be gathered: a rank that shares them with nobody has them all."""
        unsharded = torch.zeros(self.layout.numel, dtype=kind.master, device=self._device)
        for slot, parameter in zip(self.layout.slots, parameters.values(), strict=True):
            unsharded[slot.offset : slot.offset + slot.numel] = kind.numbers(first.of(slot.name, parameter))
        within = self.spec.within
        self.weights = unsharded[within(sharding.lp, -1)].to(kind.compute, copy=True)
        self.received = Received(self.spec, self.weights, trained=self.trained)
        self._outside = self.spec.levels(sharding.lp + 1, sharding.lo)
        """The levels of an all-gather after a step."""
        self._shared = kind.compute == kind.master and not any(level in sharding.weights for level in self._outside)
        """Whether masters lie in the weights: those are as exact, and the owner's arrive as they are."""
        self.master = (
            self.weights[within(sharding.lo, sharding.lp)]
            if self._shared
            else unsharded[within(sharding.lo, -1)].clone()
        )
        self._away = [kind.nothing(slot.shape, self._device) for slot in self.layout.slots]
        """What parameters are while their weights are not here: of the right shape, and not a number wherever read."""
        self.unsharded: Tensor | None = None
        """The gathered weights, of which parameters are views; the weights themselves where they are not sharded."""
        self._views: list[Tensor] = self._away
        if self.sharded:
            self._point(self._away)
        else:
            self._hold(self.weights)
        self._seen = self._versions()

    # -- weights that move ---------------------------------------------------------------------------------------------

    @property
    def gathered(self) -> bool:
        """Whether the parameters are full and can be used."""
        return self.unsharded is not None

    def _hold(self, unsharded: Tensor) -> None:
        self.unsharded = unsharded
        parts = torch.split(unsharded[: self.layout.used], [slot.numel for slot in self.layout.slots])
        self._views = [self.kind.view(part, slot.shape) for part, slot in zip(parts, self.layout.slots, strict=True)]
        self._point(self._views)

    def gather_hops(self, tag: int) -> Iterator[Gather]:
        """Weights from depth lp to full; the parameters are views of them afterwards. All ranks mean the same `tag`."""
        if self.gathered:
            return
        spec, part = self.spec, self.weights
        draw = Draw(spec.step, 1)  # the same for all gathers of a step: a recomputed forward sees the same weights
        for level in reversed(spec.levels(0, self.sharding.lp)):
            out = spec.empty(level - 1, part.dtype)
            coding = spec.coding(self.sharding.weights, level, level, P_GATHER, draw)
            yield self._gather(out, part, level, P_GATHER, coding, tag=tag, lasting=True)
            part = out
        self._hold(part)

    def release(self) -> None:
        """Let go of the full weights; the parameters cannot be used until they are gathered again.

        What was written into them (a forward that clamps its own weights) is taken over into the states first.
        """
        if not self.sharded or not self.gathered:
            return
        self.absorb_edits()
        self.unsharded = None
        self._views = self._away
        self._point(self._away)

    def _gather(
        self, out: Tensor, part: Tensor, level: int, purpose: str, coding: Coding = PLAIN, **more: Any
    ) -> Gather:
        spec = self.spec
        return Gather(out, part, spec.world, level, purpose, **coding, **more, bucket_bytes=spec.bucket_bytes)

    @property
    def follows(self) -> bool:
        """Whether weights are new as soon as their masters are: those lie in them, and nobody else has others."""
        return self._shared and not self._outside

    def regather_hops(self, *, exact: bool = False) -> Iterator[Gather]:
        """Weights at depth lp from the masters at lo: after a step, or (`exact`) after other writes, a load for one.

        Exactly means uncoded, unless `received` is to bring back what was held before.
        """
        spec, held, part = self.spec, self.weights.data, self.master
        draw = self.received.begins(exact=exact)
        if draw is None:
            return
        levels, coded = self._outside, draw != EXACT
        for level in reversed(levels):
            coding = spec.coding(self.sharding.weights, level, level, P_REFRESH, draw) if coded else PLAIN
            there = held[spec.within(level - 1, self.sharding.lp)]
            if level in self.sharding.delta_levels and coded:
                change = part - held[spec.within(level, self.sharding.lp)]
                # In place at the last hop alone: the others' references are what is held before this all-gather.
                part = there.to(part.dtype, copy=level != levels[0])
                yield self._gather(part, change, level, P_REFRESH, coding, add=True)
            else:
                sent = part.to(self.kind.compute) if coding["codec"] is IDENTITY else part
                in_place = sent.dtype == held.dtype and not self.sharding.delta_levels
                part = there if in_place else spec.empty(level - 1, sent.dtype)
                yield self._gather(part, sent, level, P_REFRESH, coding)
        if part.data_ptr() != held.data_ptr():
            held.copy_(part)
        padding = spec.padding(self.sharding.lp)
        if padding.start < padding.stop:
            held[padding] = 0.0  # what codecs that rotate blocks have left there

    def broadcast_hops(self) -> Iterator[Gather]:
        """This rank's owned range of the masters to the replicas of these masters, outermost level first."""
        spec = self.spec
        for level in reversed(spec.levels(self.sharding.lo + 1, spec.outermost)):
            part, out = (self.master[spec.within(depth, self.sharding.lo)] for depth in (level, level - 1))
            yield self._gather(out, part, level, SPREAD)

    def share(self) -> tuple[int, Tensor]:
        """(first element, view of the masters): what this rank alone stands for among all ranks, padding left out."""
        mine, held = self.spec.at(self.spec.outermost), self.spec.at(self.sharding.lo)
        end = max(mine.start, min(mine.end, self.layout.used))
        return mine.start, self.master[Interval(mine.start, end).inside(held)]

    # -- parameters ----------------------------------------------------------------------------------------------------

    def _point(self, views: Sequence[Tensor]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for parameter, view in zip(self.parameters.values(), views, strict=True):
                parameter.data = view

    def _versions(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [parameter._version for parameter in self.parameters.values()]

    def _written(self) -> list[tuple[Slot, Tensor | None]]:
        """Parameters that somebody wrote to since the last `absorb_edits`; with the tensor that was put in its place."""
        found: list[tuple[Slot, Tensor | None]] = []
        with torch._C.DisableTorchFunctionSubclass():
            each = zip(self.layout.slots, self.parameters.values(), self._views, self._seen, strict=True)
            for slot, parameter, view, version in each:
                if parameter.is_set_to(view) and parameter._version == version:
                    continue
                found.append((slot, None if parameter.data_ptr() == view.data_ptr() else parameter.data))
        return found

    def absorb_edits(self) -> None:
        """Take writes into full parameters (load_state_dict, `p.data = x`, a clamp) over into the states made from them.

        Every rank makes the same ones. Raises UseError, naming the parameter, for one that was moved or converted.
        """
        written = self._written()
        if not written:
            return
        for slot, other in written:
            self._refuse_another(slot, other)
            if other is not None:
                assert self.unsharded is not None
                self.unsharded[slot.offset : slot.offset + slot.numel] = self.kind.numbers(other)
            self._take_over(slot)
            self.received.edited()
        if self.unsharded is not None:
            self._point(self._views)
        self._seen = self._versions()

    def _refuse_another(self, slot: Slot, other: Tensor | None) -> None:
        there = self._away[self.layout.slots.index(slot)]
        if other is not None and (
            self.unsharded is None
            or (other.shape, other.dtype, other.device) != (there.shape, there.dtype, there.device)
        ):
            raise UseError(
                f"{slot.name} was moved, converted or replaced after shard(); do that before, then shard anew"
            )

    def _take_over(self, slot: Slot) -> None:
        """Of what has changed alone: the rest of a master is finer than the weight that was made of it."""
        assert self.unsharded is not None
        self.spec.world.settle()  # others may be reading these weights still
        written = self.unsharded.detach()
        for depth, held in ((self.sharding.lo, self.master), (self.sharding.lp, self.weights)):
            mine = self.spec.at(depth)
            met = mine.meet(slot)
            if held is not self.unsharded and len(met):
                old, new = held[met.inside(mine)], written[met.start : met.end]
                old.copy_(torch.where(old.to(new.dtype) == new, old, new.to(old.dtype)))

    def detached(self) -> str | None:
        """The name of a parameter that is no longer what this buffer made of it; None if all are."""
        with torch._C.DisableTorchFunctionSubclass():
            for (name, parameter), away in zip(self.parameters.items(), self._away, strict=True):
                if parameter.dtype != away.dtype or parameter.requires_grad != self.trained:
                    return name
        return None

    # -- what others see -----------------------------------------------------------------------------------------------

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight as it is computed with."""
        return self.kind.compute.itemsize

    def pieces(self) -> list[Piece]:
        """The masters of this rank as pieces of logical tensors."""
        return [
            Piece(f"params/{name}", shape, offset, self.master[where])
            for name, shape, offset, where in self.spec.parts(self.sharding.lo)
        ]

    def held_bytes(self) -> dict[str, int]:
        """Bytes of both states on this rank; masters that lie in the weights count as optimizer state."""
        return {
            "params": self.weights.nbytes - (self.master.nbytes if self._shared else 0),
            "master": self.master.nbytes,
        }
