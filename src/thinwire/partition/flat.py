"""The states of one flat buffer: weights at depth lp, gradient sums at lg, masters at lo, and the chains that move them.

A chain is a generator: it issues a collective, yields its handle, and goes on when that has arrived. The engine decides
when; this file decides what becomes of the weights, `thinwire.partition.sums` what becomes of the gradients. All numbers
are those of `layout`: N elements whole, N / S_d at depth d.

Exactness: the sums of every partition nest in the same order (inner level first, ranks in order), and every rank,
the owner too, uses what was decoded from the wire, so replicas hold the same bits.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from thinwire.comm.codec import IDENTITY
from thinwire.comm.collectives import all_gather
from thinwire.comm.handle import Handle
from thinwire.comm.world import World
from thinwire.partition.deferred import FirstValues
from thinwire.partition.layout import Interval, Layout, Slot
from thinwire.partition.optimizer import Owned
from thinwire.partition.pieces import Piece
from thinwire.partition.place import Cut, Draw, Place
from thinwire.partition.received import EXACT, Received
from thinwire.partition.sums import Sums
from thinwire.traffic import P_GATHER, P_REFRESH, SPREAD, Flow


class Flat:
    """One flat buffer of a unit. `parameters` become views of it while they are gathered."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        compute: torch.dtype,
        master: torch.dtype,
        multiple: int,
        cut: Cut,
        world: World,
        first: FirstValues,
    ) -> None:
        self.parameters, self.cut = parameters, cut
        one = next(iter(parameters.values()))
        self.trained, self._device = one.requires_grad, one.device
        self.layout = Layout.of([(name, tuple(p.shape)) for name, p in parameters.items()], multiple=multiple)
        self.place = Place(self.layout, cut, world, self._device)
        self._compute = compute
        whole = torch.zeros(self.layout.numel, dtype=master, device=self._device)
        for slot, parameter in zip(self.layout.slots, parameters.values(), strict=True):
            whole[slot.offset : slot.offset + slot.numel] = first.of(slot.name, parameter).flatten()
        within = self.place.within
        self.weights = whole[within(cut.lp, -1)].to(compute, copy=True)
        self.received = Received(self.place, self.weights, trained=self.trained)
        outside = self.place.levels(cut.lp + 1, cut.lo)
        self._shared = compute == master and not any(level in cut.weights for level in outside)
        """Whether masters lie in the weights: those are as exact, and the owner's arrive as they are."""
        self.master = self.weights[within(cut.lo, cut.lp)] if self._shared else whole[within(cut.lo, -1)].clone()
        self.sums = Sums(parameters, self.place, dtype=master, trained=self.trained)
        self._make_whole()
        away = torch.full((), math.nan, dtype=compute, device=self._device)
        self._away = [away.expand(slot.shape) for slot in self.layout.slots]
        """What parameters are while their weights are not here: of the right shape, and not a number wherever read."""
        self.gathered = cut.lp < 0
        self._point(self._views)
        if not self.gathered:
            self.release()
        self._seen = self._versions()

    def _make_whole(self) -> None:
        """The whole weights, of which parameters are views while gathered: the weights themselves if they are not cut."""
        lp = self.cut.lp
        self._whole = (
            self.weights if lp < 0 else torch.empty(self.layout.numel, dtype=self._compute, device=self._device)
        )
        self._views = [self._whole[s.offset : s.offset + s.numel].view(s.shape) for s in self.layout.slots]

    # -- weights that move ---------------------------------------------------------------------------------------------

    def gather_chain(self) -> Iterator[Handle]:
        """Weights from depth lp to whole; the parameters are views of them afterwards."""
        if self.gathered:
            return
        place, part = self.place, self.weights
        self._whole.untyped_storage().resize_(self._whole.numel() * self._whole.element_size())
        levels = place.levels(0, self.cut.lp)
        if not levels:
            self._whole.data.copy_(part)
        draw = Draw(place.step, 1)  # the same for all gathers of a step: a recomputed forward sees the same weights
        for level in reversed(levels):
            out = self._whole.data if level == levels[0] else place.empty(level - 1, part.dtype)
            codec = place.coding(self.cut.weights, level, level, P_GATHER, draw)
            yield all_gather(out, part, world=place.world, level=level, purpose=P_GATHER, codec=codec)
            part = out
        self._point(self._views)
        self.gathered = True

    def release(self) -> None:
        """Give the whole weights' memory back; the parameters cannot be used until they are gathered again."""
        if self.cut.lp < 0:
            return
        self._point(self._away)
        if not self._whole.untyped_storage().resizable():
            self._make_whole()  # somebody looked at it as a numpy array and may still hold it
        self._whole.untyped_storage().resize_(0)
        self.gathered = False

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
            codec = place.coding(self.cut.weights, level, level, P_REFRESH, draw) if coded else IDENTITY
            there = held[place.within(level - 1, self.cut.lp)]
            if level in self.cut.delta_levels and coded:
                change = part - held[place.within(level, self.cut.lp)]
                # In place at the last hop alone: the others' references are what is held before this refresh.
                part = there.to(part.dtype, copy=level != levels[0])
                yield all_gather(part, change, world=place.world, level=level, purpose=P_REFRESH, codec=codec, add=True)
            else:
                sent = part.to(self._compute) if codec is IDENTITY else part
                in_place = sent.dtype == held.dtype and not self.cut.delta_levels
                part = there if in_place else place.empty(level - 1, sent.dtype)
                yield all_gather(part, sent, world=place.world, level=level, purpose=P_REFRESH, codec=codec)
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

    def _point(self, views: list[Tensor]) -> None:
        for parameter, view in zip(self.parameters.values(), views, strict=True):
            parameter.data = view

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters.values()]

    def written(self) -> list[str]:
        """Names of the parameters that somebody wrote to since the last `absorb_edits`."""
        changed = zip(self.parameters, self._seen, self._versions(), strict=True)
        return [name for name, before, now in changed if before != now]

    def absorb_edits(self) -> None:
        """Take writes into whole parameters (load_state_dict, a manual edit) over into the states made from them."""
        written = set(self.written())
        for slot in self.layout.slots:
            if slot.name in written:
                self._take_over(slot)
                self.received.edited()
        self._seen = self._versions()

    def _take_over(self, slot: Slot) -> None:
        whole = self._whole.detach()
        for depth, held in ((self.cut.lp, self.weights), (self.cut.lo, self.master)):
            mine = self.place.at(depth)
            met = mine.meet(slot)
            if held is not self._whole and len(met):
                held[met.inside(mine)] = whole[met.start : met.end].to(held.dtype)

    def detached(self) -> str | None:
        """The name of a parameter that is no longer what this buffer made of it; None if all are."""
        views = self._views if self.gathered else self._away
        for (name, parameter), view in zip(self.parameters.items(), views, strict=True):
            if (
                parameter.data_ptr() != view.data_ptr()
                or parameter.dtype != view.dtype
                or parameter.requires_grad != self.trained
            ):
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
        return self._whole.element_size()

    def owned(self) -> list[Owned]:
        """The masters of this rank that are trained; their gradient is looked up when a step is taken."""
        return [
            Owned(name, shape, offset, self.master[where], partial(self.sums.reduced_at, where))
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
