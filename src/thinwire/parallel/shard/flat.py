"""The states of one flat buffer: weights at depth lp, gradient sums at lg, masters at lo, and the chains that move them.

A chain is a generator: it issues a collective, yields its handle, and goes on when that has arrived. The engine decides
when; this file decides what becomes of the weights, `accumulation` what becomes of the gradients. All numbers
are those of `layout`: N elements whole, N / S_d at depth d.

Exactness: the sums of every partition nest in the same order (inner level first, ranks in order), and every rank,
the owner too, uses what was decoded from the wire, so replicas hold the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from thinwire.comm.codecs.codec import IDENTITY
from thinwire.comm.collectives import all_gather
from thinwire.comm.handle import Handle
from thinwire.comm.world import World
from thinwire.errors import UseError
from thinwire.parallel.shard.accumulation import Sums
from thinwire.parallel.shard.deferred import FirstValues
from thinwire.parallel.shard.dtypes import Kind
from thinwire.parallel.shard.layout import Interval, Layout, Piece, Slot
from thinwire.parallel.shard.optimizer import Owned
from thinwire.parallel.shard.received import EXACT, Received
from thinwire.parallel.shard.shard_spec import PLAIN, Cut, Draw, Place
from thinwire.plan.traffic import P_GATHER, P_REFRESH, SPREAD, Flow


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
        cut: Cut,
        world: World,
        first: FirstValues,
    ) -> None:
        self.parameters, self.cut, self.kind = parameters, cut, kind
        self.trained, self._device = kind.trained, next(iter(parameters.values())).device
        self.layout = Layout.of([(name, kind.shape(p.shape)) for name, p in parameters.items()], multiple=multiple)
        self.place = Place(self.layout, cut, world, self._device)
        whole = torch.zeros(self.layout.numel, dtype=kind.master, device=self._device)
        for slot, parameter in zip(self.layout.slots, parameters.values(), strict=True):
            whole[slot.offset : slot.offset + slot.numel] = kind.numbers(first.of(slot.name, parameter))
        within = self.place.within
        self.weights = whole[within(cut.lp, -1)].to(kind.compute, copy=True)
        self.received = Received(self.place, self.weights, trained=self.trained)
        outside = self.place.levels(cut.lp + 1, cut.lo)
        self._shared = kind.compute == kind.master and not any(level in cut.weights for level in outside)
        """Whether masters lie in the weights: those are as exact, and the owner's arrive as they are."""
        self.master = self.weights[within(cut.lo, cut.lp)] if self._shared else whole[within(cut.lo, -1)].clone()
        self.sums = Sums(parameters, self.place, kind=kind)
        self._away = [kind.nothing(slot.shape, self._device) for slot in self.layout.slots]
        """What parameters are while their weights are not here: of the right shape, and not a number wherever read."""
        self.whole: Tensor | None = None
        """The gathered weights, of which parameters are views; the weights themselves where they are not cut."""
        self._views: list[Tensor] = self._away
        if cut.lp < 0:
            self._hold(self.weights)
        else:
            self._point(self._away)
        self._seen = self._versions()

    # -- weights that move ---------------------------------------------------------------------------------------------

    @property
    def gathered(self) -> bool:
        """Whether the parameters are whole and can be used."""
        return self.whole is not None

    def _hold(self, whole: Tensor) -> None:
        self.whole = whole
        self._views = [self.kind.view(whole[s.offset : s.offset + s.numel], s.shape) for s in self.layout.slots]
        self._point(self._views)

    def gather_chain(self, tag: int) -> Iterator[Handle]:
        """Weights from depth lp to whole; the parameters are views of them afterwards. All ranks mean the same `tag`."""
        if self.gathered:
            return
        place, part = self.place, self.weights
        draw = Draw(place.step, 1)  # the same for all gathers of a step: a recomputed forward sees the same weights
        for level in reversed(place.levels(0, self.cut.lp)):
            out = place.empty(level - 1, part.dtype)
            coding = place.coding(self.cut.weights, level, level, P_GATHER, draw)
            yield all_gather(
                out, part, world=place.world, level=level, purpose=P_GATHER, **coding, tag=tag, lasting=True
            )
            part = out
        self._hold(part)

    def release(self) -> None:
        """Let go of the whole weights; the parameters cannot be used until they are gathered again.

        What was written into them (a forward that clamps its own weights) is taken over into the states first.
        """
        if self.cut.lp < 0 or not self.gathered:
            return
        self.absorb_edits()
        self.whole = None
        self._views = self._away
        self._point(self._away)

    def refresh_chain(self, *, exact: bool = False) -> Iterator[Handle]:
        """Weights at depth lp from the masters at lo: after a step, or (`exact`) after other writes, a load for one.

        Exactly means uncoded, unless `received` is to bring back what was held before.
        """
        place, held, part = self.place, self.weights.data, self.master
        draw = self.received.begins(exact=exact)
        if draw is None:
            return
        levels, coded = place.levels(self.cut.lp + 1, self.cut.lo), draw != EXACT
        for level in reversed(levels):
            coding = place.coding(self.cut.weights, level, level, P_REFRESH, draw) if coded else PLAIN
            there = held[place.within(level - 1, self.cut.lp)]
            if level in self.cut.delta_levels and coded:
                change = part - held[place.within(level, self.cut.lp)]
                # In place at the last hop alone: the others' references are what is held before this refresh.
                part = there.to(part.dtype, copy=level != levels[0])
                yield all_gather(part, change, world=place.world, level=level, purpose=P_REFRESH, **coding, add=True)
            else:
                sent = part.to(self.kind.compute) if coding["codec"] is IDENTITY else part
                in_place = sent.dtype == held.dtype and not self.cut.delta_levels
                part = there if in_place else place.empty(level - 1, sent.dtype)
                yield all_gather(part, sent, world=place.world, level=level, purpose=P_REFRESH, **coding)
        if part.data_ptr() != held.data_ptr():
            held.copy_(part)
        held[place.padding(self.cut.lp)] = 0.0  # what codecs that rotate blocks have left there

    def spread_chain(self) -> Iterator[Handle]:
        """This rank's share of the masters to the replicas of these masters, outermost level first."""
        place = self.place
        for level in reversed(place.levels(self.cut.lo + 1, place.outermost)):
            part, out = (self.master[place.within(depth, self.cut.lo)] for depth in (level, level - 1))
            yield all_gather(out, part, world=place.world, level=level, purpose=SPREAD)

    def share(self) -> tuple[int, Tensor]:
        """(first element, view of the masters): what this rank alone stands for among all ranks, padding left out."""
        mine, held = self.place.at(self.place.outermost), self.place.at(self.cut.lo)
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
            each = zip(
                self.layout.slots, self.parameters.values(), self._views, self._seen, self._versions(), strict=True
            )
            for slot, parameter, view, before, now in each:
                if parameter.data_ptr() != view.data_ptr():
                    found.append((slot, parameter.data))
                elif before != now:
                    found.append((slot, None))
        return found

    def absorb_edits(self) -> None:
        """Take writes into whole parameters (load_state_dict, `p.data = x`, a clamp) over into the states made from them.

        Every rank makes the same ones. Raises UseError, naming the parameter, for one that was moved or converted.
        """
        for slot, other in self._written():
            self._refuse_another(slot, other)
            if other is not None:
                assert self.whole is not None
                self.whole[slot.offset : slot.offset + slot.numel] = self.kind.numbers(other)
            self._take_over(slot)
            self.received.edited()
        if self.whole is not None:
            self._point(self._views)
        self._seen = self._versions()

    def _refuse_another(self, slot: Slot, other: Tensor | None) -> None:
        there = self._away[self.layout.slots.index(slot)]
        if other is not None and (
            self.whole is None or (other.shape, other.dtype, other.device) != (there.shape, there.dtype, there.device)
        ):
            raise UseError(
                f"{slot.name} was moved, converted or replaced after shard(); do that before, then shard anew"
            )

    def _take_over(self, slot: Slot) -> None:
        """Of what has changed alone: the rest of a master is finer than the weight that was made of it."""
        assert self.whole is not None
        self.place.world.settle()  # others may be reading these weights still
        written = self.whole.detach()
        for depth, held in ((self.cut.lo, self.master), (self.cut.lp, self.weights)):
            mine = self.place.at(depth)
            met = mine.meet(slot)
            if held is not self.whole and len(met):
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

    def flow(self, gathers: int, step: int) -> Flow:
        """What the traffic formula needs to know of this buffer in a step, counted from 0."""
        summing = self.sums.low_rank_at(step)
        low_rank = None if summing is None else (summing.level, summing.lengths)
        return Flow(self.layout.numel, self.cut.lp, self.cut.lg, self.cut.lo, gathers, self.trained, low_rank)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight as it is computed with."""
        return self.kind.compute.itemsize

    def owned(self, grad_of: Callable[[Sums, str, slice], Tensor | None]) -> list[Owned]:
        """The masters of this rank that are trained; their gradient is looked up when a step is taken."""
        return [
            Owned(name, shape, offset, self.master[where], partial(grad_of, self.sums, name, where))
            for name, shape, offset, where in self.place.parts(self.cut.lo)
            if self.trained
        ]

    def pieces(self) -> list[Piece]:
        """The masters of this rank as pieces of logical tensors."""
        return [
            Piece(f"params/{name}", shape, offset, self.master[where])
            for name, shape, offset, where in self.place.parts(self.cut.lo)
        ]

    def held_bytes(self) -> dict[str, int]:
        """Bytes of each state on this rank; masters that lie in the weights count as optimizer state."""
        return {
            "params": self.weights.nbytes - (self.master.nbytes if self._shared else 0),
            "grads": self.sums.nbytes,
            "master": self.master.nbytes,
        }
