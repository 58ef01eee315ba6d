"""The states of one flat buffer: weights at depth lp, gradient sums at lg, masters at lo, and the chains that move them.

A chain is a generator: it issues a collective, yields its handle, and goes on when that has arrived. The engine decides
when; this file decides what. All numbers are those of `layout`: N elements whole, N / S_d at depth d.

Exactness: the sums of every partition nest in the same order (inner level first, ranks in order), and every rank,
the owner too, uses what was decoded from the wire, so replicas hold the same bits.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinwire.comm.codec import IDENTITY, Codec
from thinwire.comm.collectives import all_gather, reduce_scatter
from thinwire.comm.handle import Handle
from thinwire.comm.lowrank import LowRank, Matrix
from thinwire.comm.residual import Residual
from thinwire.comm.world import World
from thinwire.partition.deferred import FirstValues
from thinwire.partition.layout import Interval, Layout, Slot, interval, matrices_in
from thinwire.partition.optimizer import Owned
from thinwire.partition.pieces import Piece
from thinwire.partition.wire import LowRankHop
from thinwire.traffic import G_GATHER, G_REDUCE, P_GATHER, P_REFRESH, SPREAD, Flow

_DRAWING = (P_GATHER, P_REFRESH, G_REDUCE, G_GATHER)
"""Purposes that draw random numbers, each its own."""


@dataclass(frozen=True)
class Cut:
    """How the states of a flat buffer are cut, and how they travel: depths lp, lg, lo and a codec per level."""

    lp: int
    lg: int
    lo: int
    weights: Mapping[int, Codec]
    grads: Mapping[int, Codec]
    delta_levels: frozenset[int]
    """Levels whose weights travel as differences from what the receiver holds."""
    feedback_level: int | None
    """The gradient hop whose coding error is carried over to the next step."""
    low_rank: LowRankHop | None = None


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
        self.parameters, self.cut, self.world = parameters, cut, world
        self.trained = next(iter(parameters.values())).requires_grad
        self.layout = Layout.of([(name, tuple(p.shape)) for name, p in parameters.items()], multiple=multiple)
        self._device = next(iter(parameters.values())).device
        self._compute, self._master_dtype = compute, master
        self._held = self._intervals()
        whole = torch.zeros(self.layout.numel, dtype=master, device=self._device)
        for slot, parameter in zip(self.layout.slots, parameters.values(), strict=True):
            whole[slot.offset : slot.offset + slot.numel] = first.of(slot.name, parameter).flatten()
        self.weights = whole[self._slice(cut.lp)].to(compute, copy=True)
        self._shared = compute == master and not any(level in cut.weights for level in self._levels(cut.lp + 1, cut.lo))
        """Whether masters lie in the weights: those are as exact, and the owner's arrive as they are."""
        mine = self.weights[self.at(cut.lo).inside(self.at(cut.lp))]
        self.master = mine if self._shared else whole[self._slice(cut.lo)].clone()
        self.grads = torch.zeros(len(self.at(cut.lg)) if self.trained else 0, dtype=master, device=self._device)
        self._begun = False
        """Whether a micro-batch of the step under way is in the sums or on its way; what they held before is nothing."""
        self._complete = False
        """Whether the sums at lo are those of the whole step."""
        self.low_rank = self._make_low_rank()
        self.residual = Residual() if self.low_rank is None else self.low_rank.residual
        self._make_whole()
        away = torch.full((), math.nan, dtype=compute, device=self._device)
        self._away = [away.expand(slot.shape) for slot in self.layout.slots]
        """What parameters are while their weights are not here: of the right shape, and not a number wherever read."""
        self.gathered = cut.lp < 0
        self._step, self._number = 0, 0
        self._draws: Counter[str] = Counter()
        self._point(self._views)
        if not self.gathered:
            self.release()
        self._seen = self._versions()

    def _make_low_rank(self) -> LowRank | None:
        """What sums this buffer's gradients at the hop of low rank, if they take that hop."""
        hop = self.cut.low_rank
        if hop is None or not self.trained or self.world.fanout(hop.level) == 1:
            return None
        part = self.at(hop.level - 1)
        matrices = [Matrix(*found) for found in matrices_in(self.layout, part, hop.rank)]
        return LowRank(
            matrices,
            len(part),
            rank=hop.rank,
            world=self.world,
            level=hop.level,
            purposes=(G_REDUCE, G_GATHER),
            device=self._device,
        )

    def _make_whole(self) -> None:
        """The whole weights, of which parameters are views while gathered: the weights themselves if they are not cut."""
        lp = self.cut.lp
        self._whole = (
            self.weights if lp < 0 else torch.empty(self.layout.numel, dtype=self._compute, device=self._device)
        )
        self._views = [self._whole[s.offset : s.offset + s.numel].view(s.shape) for s in self.layout.slots]

    # -- where things are ----------------------------------------------------------------------------------------------

    def at(self, depth: int) -> Interval:
        """The interval that this rank holds of a state that is cut at `depth`."""
        return self._held[depth]

    def _intervals(self) -> dict[int, Interval]:
        """What this rank holds at each depth, -1 (whole) to the outermost level."""
        cluster = self.world.cluster
        fanouts, place = [level.fanout for level in cluster.levels], cluster.coordinates(self.world.rank)
        return {depth: interval(self.layout.numel, fanouts, place, depth) for depth in range(-1, len(fanouts))}

    def _slice(self, depth: int) -> slice:
        part = self.at(depth)
        return slice(part.start, part.end)

    def _levels(self, first: int, last: int) -> list[int]:
        """Levels first..last that join more than one member."""
        return [level for level in range(first, last + 1) if self.world.fanout(level) > 1]

    @property
    def feedback_level(self) -> int | None:
        """The gradient hop whose loss is carried over to the next step."""
        if not self.trained:
            return None
        return self.cut.feedback_level if self.low_rank is None else self.low_rank.level

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight as it is computed with."""
        return self._whole.element_size()

    def salt(self, step: int, number: int) -> None:
        """What stochastic rounding draws from: steps taken so far, and the number of this buffer among all."""
        self._step, self._number = step, number
        self._draws.clear()

    def _coding(self, codecs: Mapping[int, Codec], level: int, depth: int, purpose: str) -> Codec:
        """The codec of a level, about to code anew. Ranks that hold the same interval at `depth` draw the same numbers."""
        codec, part = codecs.get(level, IDENTITY), self.at(depth)
        if codec is not IDENTITY:
            self._draws[purpose] += 1
            draw = (self._draws[purpose] << 3) + _DRAWING.index(purpose)
            who = part.start // len(part)
            codec.salt = (((self._step << 20) + self._number << 12) + draw) * self.world.size + who
        return codec

    def _low_rank_at(self, step: int) -> LowRank | None:
        """What sums the gradients of a step at the hop of low rank; the first steps' are summed whole."""
        begun = self.cut.low_rank is not None and step >= self.cut.low_rank.first_step
        return self.low_rank if begun else None

    def flow(self, gathers: int, step: int) -> Flow:
        """What the traffic formula needs to know of this buffer in a step, counted from 0."""
        summing = self._low_rank_at(step)
        low_rank = None if summing is None else (summing.level, summing.lengths)
        return Flow(self.layout.numel, self.cut.lp, self.cut.lg, self.cut.lo, gathers, self.trained, low_rank)

    # -- weights -------------------------------------------------------------------------------------------------------

    def gather_chain(self) -> Iterator[Handle]:
        """Weights from depth lp to whole; the parameters are views of them afterwards."""
        if self.gathered:
            return
        self._whole.untyped_storage().resize_(self._whole.numel() * self._whole.element_size())
        levels = self._levels(0, self.cut.lp)
        part = self.weights
        if not levels:
            self._whole.data.copy_(part)
        for level in reversed(levels):
            out = self._whole.data if level == levels[0] else self._empty(self.at(level - 1), part.dtype)
            codec = self._coding(self.cut.weights, level, level, P_GATHER)
            yield all_gather(out, part, world=self.world, level=level, purpose=P_GATHER, codec=codec)
            part = out
        self._point(self._views)
        self.gathered = True

    def release(self) -> None:
        """Give the whole weights' memory back; the parameters cannot be used until they are gathered again."""
        if self.cut.lp < 0:
            return
        self._point(self._away)
        if (
            not self._whole.untyped_storage().resizable()
        ):  # somebody looked at it as a numpy array and may still hold it
            self._make_whole()
        self._whole.untyped_storage().resize_(0)
        self.gathered = False

    def refresh_chain(self, *, exact: bool = False) -> Iterator[Handle]:
        """Weights at depth lp from the masters at lo: after a step, or (`exact`, nothing coded) after a load."""
        held, part = self.weights.data, self.master
        levels = self._levels(self.cut.lp + 1, self.cut.lo)
        for level in reversed(levels):
            codec = IDENTITY if exact else self._coding(self.cut.weights, level, level, P_REFRESH)
            there = held[self.at(level - 1).inside(self.at(self.cut.lp))]
            if level in self.cut.delta_levels and not exact:
                reference = held[self.at(level).inside(self.at(self.cut.lp))]
                change = part - reference
                # In place at the last hop alone: the others' references are what is held before this refresh.
                part = there.to(part.dtype, copy=level != levels[0])
                yield all_gather(part, change, world=self.world, level=level, purpose=P_REFRESH, codec=codec, add=True)
            else:
                sent = part.to(self._compute) if codec is IDENTITY else part
                in_place = sent.dtype == held.dtype and not self.cut.delta_levels
                out = there if in_place else self._empty(self.at(level - 1), sent.dtype)
                yield all_gather(out, sent, world=self.world, level=level, purpose=P_REFRESH, codec=codec)
                part = out
        if part.data_ptr() != held.data_ptr():
            held.copy_(part)

    def spread_chain(self) -> Iterator[Handle]:
        """This rank's share of the masters to the replicas of these masters, outermost level first."""
        for level in reversed(self._levels(self.cut.lo + 1, len(self.world.cluster.levels) - 1)):
            held = self.at(self.cut.lo)
            part, out = (self.master[self.at(depth).inside(held)] for depth in (level, level - 1))
            yield all_gather(out, part, world=self.world, level=level, purpose=SPREAD)

    def share(self) -> tuple[int, Tensor]:
        """(first element, view of the masters): what this rank alone stands for among all ranks, padding left out."""
        mine, held = self.at(len(self.world.cluster.levels) - 1), self.at(self.cut.lo)
        end = max(mine.start, min(mine.end, self.layout.used))
        return mine.start, self.master[Interval(mine.start, end).inside(held)]

    def _empty(self, part: Interval, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(part), dtype=dtype, device=self._device)

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
        self._seen = self._versions()

    def _take_over(self, slot: Slot) -> None:
        whole = self._whole.detach()
        for depth, held in ((self.cut.lp, self.weights), (self.cut.lo, self.master)):
            mine = self.at(depth)
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

    # -- gradients -----------------------------------------------------------------------------------------------------

    def _add_grads(self, first: bool) -> None:
        """Add the parameters' gradients to the sums, which are whole; the first ones of a step begin them."""
        for slot, parameter in zip(self.layout.slots, self.parameters.values(), strict=True):
            total = self.grads[slot.offset : slot.offset + slot.numel]
            if parameter.grad is not None:
                add = total.copy_ if first else total.add_
                add(parameter.grad.flatten())
                parameter.grad = None
            elif first:
                total.zero_()

    def _take_grads(self) -> list[Tensor]:
        """Take the parameters' gradients away: flat pieces of N elements in all; one that is missing counts as zero."""
        pieces: list[Tensor] = []
        end = 0
        for slot, parameter in zip(self.layout.slots, self.parameters.values(), strict=True):
            end = slot.offset + slot.numel
            grad, parameter.grad = parameter.grad, None
            pieces.append(self._zeros(slot.numel) if grad is None else grad.flatten().to(self._master_dtype))
        return [*pieces, self._zeros(self.layout.numel - end)] if end < self.layout.numel else pieces

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self._master_dtype, device=self._device)

    def reduce_chain(self, *, last: bool) -> Iterator[Handle]:
        """This micro-batch's gradients into the sum at depth lg; after the last one on to depth lo, replicas included."""
        first, self._begun = not self._begun, True
        begins: Tensor | list[Tensor] = self.grads
        if self.cut.lg >= 0:
            part: Tensor | list[Tensor] = self._take_grads()
            levels = self._levels(0, self.cut.lg)
            for level in levels:
                out = self.grads if first and level == levels[-1] else self._empty(self.at(level), self._master_dtype)
                yield self._reduce(out, part, level)
                part = out
            if part is not self.grads:
                (self.grads.copy_ if first else self.grads.add_)(_whole(part))
        elif first and last and self._sent_in_pieces():
            begins = self._take_grads()
        else:
            self._add_grads(first)
        if not last:
            return
        yield from self._sum_outwards(begins)
        self._complete = True

    def _sent_in_pieces(self) -> bool:
        """Whether the first hop of whole sums takes gradients from where backward has left them."""
        hop = next(iter(self._levels(0, len(self.world.cluster.levels) - 1)), None)
        if hop is None or self.world.neighbours(hop) is None or hop in self.cut.grads:
            return False
        low_rank = self._low_rank_at(self._step)
        return low_rank is None or low_rank.level != hop

    def _sum_outwards(self, part: Tensor | list[Tensor]) -> Iterator[Handle]:
        """The sums at lg, in `part`, on to depth lo and over its replicas."""
        low_rank = self._low_rank_at(self._step)
        for level in self._levels(self.cut.lg + 1, self.cut.lo):
            out = self._sums_at(level)
            if low_rank is not None and level == low_rank.level:
                yield from low_rank.reduce(out, _whole(part), self.at(level).inside(self.at(level - 1)))
            else:
                yield self._reduce(out, part, level)
            part = out
        yield from self._all_reduce(part)

    def _sums_at(self, depth: int) -> Tensor:
        """The part of the gradient sums that this rank holds at `depth`, outside lg: what goes further is left behind."""
        return self.grads[self.at(depth).inside(self.at(self.cut.lg))]

    def _all_reduce(self, part: Tensor | list[Tensor]) -> Iterator[Handle]:
        """Sum over the replicas: reduce-scatter outwards, gather back inwards, each with the level's codec."""
        levels = self._levels(self.cut.lo + 1, len(self.world.cluster.levels) - 1)
        held = [self._sums_at(self.cut.lo)]
        low_rank = self._low_rank_at(self._step) if levels else None
        for level in levels if low_rank is None else levels[:-1]:
            held.append(self._sums_at(level))
            yield self._reduce(held[-1], part, level)
            part = held[-1]
        if low_rank is not None:  # it sums without cutting, and is the last
            yield from low_rank.reduce(held[-1], held[-1], slice(None))
        for level in reversed(levels if low_rank is None else levels[:-1]):
            inner = held.pop()
            codec = self._coding(self.cut.grads, level, level, G_GATHER)
            yield all_gather(held[-1], inner, world=self.world, level=level, purpose=G_GATHER, codec=codec)

    def _reduce(self, out: Tensor, part: Tensor | list[Tensor], level: int) -> Handle:
        codec = self._coding(self.cut.grads, level, len(self.world.cluster.levels) - 1, G_REDUCE)
        if level == self.cut.feedback_level:
            part = self._with_residual(_whole(part), codec, self.world.fanout(level))
        handle = reduce_scatter(out, part, world=self.world, level=level, purpose=G_REDUCE, codec=codec)
        if isinstance(part, list):
            part.clear()  # the handle keeps what is still needed, and no longer than that
        return handle

    def _with_residual(self, part: Tensor, codec: Codec, chunks: int) -> Tensor:
        """Add what earlier steps lost to coding; what this one loses counts once the step is applied."""
        compensated = self.residual.plus(part)
        n = compensated.numel() // chunks
        sent = torch.cat([codec.decode(codec.encode(chunk), n, chunk.dtype) for chunk in compensated.view(chunks, n)])
        self.residual.leave(compensated - sent)
        return compensated

    @property
    def reduced(self) -> Tensor:
        """The summed gradient of this rank's masters; complete after the last micro-batch's chain has landed."""
        assert self._complete, "gradients are not reduced yet"
        return self._sums_at(self.cut.lo)

    @property
    def reduced_used(self) -> Tensor:
        """`reduced` without the padding, into which codecs may put noise."""
        mine = self.at(self.cut.lo)
        return self.reduced[: max(0, min(len(mine), self.layout.used - mine.start))]

    def applied(self) -> None:
        """The step was taken: keep what error feedback lost, start new sums."""
        (self.low_rank or self.residual).applied()
        self.dropped()

    def dropped(self) -> None:
        """Forget the gradients and what this step would have lost."""
        self._begun = self._complete = False
        (self.low_rank or self.residual).dropped()

    # -- what others see -----------------------------------------------------------------------------------------------

    def parts(self, make: Callable[[str, tuple[int, ...], int, slice], None], depth: int | None = None) -> None:
        """Call make(name, shape, offset in the parameter, slice of what is held) for each parameter met at `depth`.

        The default depth is the masters'.
        """
        mine = self.at(self.cut.lo if depth is None else depth)
        for slot in self.layout.slots:
            met = mine.meet(slot)
            if len(met):
                make(slot.name, slot.shape, met.start - slot.offset, met.inside(mine))

    def owned(self) -> list[Owned]:
        """The masters of this rank that are trained; their gradient is looked up when a step is taken."""
        made: list[Owned] = []
        if self.trained:
            self.parts(lambda name, shape, offset, where: made.append(
                Owned(name, shape, offset, self.master[where], lambda: self.reduced[where])
            ))  # fmt: skip
        return made

    def pieces(self) -> list[Piece]:
        """The masters of this rank as pieces of logical tensors."""
        made: list[Piece] = []
        self.parts(
            lambda name, shape, offset, where: made.append(Piece(f"params/{name}", shape, offset, self.master[where]))
        )
        return made

    def held_bytes(self) -> dict[str, int]:
        """Bytes of each state on this rank; masters that lie in the weights count as optimizer state."""
        return {
            "params": self.weights.nbytes - (self.master.nbytes if self._shared else 0),
            "grads": self.grads.nbytes,
            "master": self.master.nbytes,
        }


def _whole(part: Tensor | list[Tensor]) -> Tensor:
    return part if isinstance(part, Tensor) else torch.cat(part)
