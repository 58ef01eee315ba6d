"""The gradient sums of one flat buffer: at depth lg while micro-batches come, at depth lo once a step's last has come.

The sums of every partition nest in the same order (inner level first, ranks in order). Chains are as in
`thinwire.parallel.shard.flat`.

A rank that nobody adds to makes no sums in a step of one micro-batch: gradients stay where backward has left them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.collectives import all_gather, reduce_scatter
from thinwire.comm.handle import Handle
from thinwire.comm.lowrank import LowRank, Matrix, Residual
from thinwire.errors import UseError
from thinwire.parallel.shard.dtypes import Kind, sum_of_squares
from thinwire.parallel.shard.layout import matrices_in
from thinwire.parallel.shard.shard_spec import Coding, Draw, Place
from thinwire.plan.traffic import G_GATHER, G_REDUCE


class Sums:
    """Of the gradients of `parameters`, in the order in which they lie in the buffer; empty if they are not trained."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], place: Place, *, kind: Kind) -> None:
        self._parameters, self.place, self._cut, self._kind = parameters, place, place.cut, kind
        self._trained, self.dtype = kind.trained, kind.master
        self._numel = len(place.at(self._cut.lg)) if kind.trained else 0
        self._alone = not place.levels(0, place.outermost)
        """Whether nobody adds to this rank's gradients."""
        self._held = None if self._alone else self._zeros(self._numel)
        self._left: dict[int, Tensor] = {}
        """Gradients that were left where they are: flat pieces of this buffer, by where they begin."""
        self._tag = 0
        self.came = [False] * len(parameters)
        """Of each parameter, whether backward has given it a gradient in this step, on this rank."""
        self._begun = False
        """Whether a micro-batch of the step under way is in the sums or on its way; what they held before is nothing."""
        self.complete = False
        """Whether the sums at lo are those of the step, as far as it has come."""
        self._earlier: Tensor | None = None
        """Complete sums of this step from before it went on all the same."""
        self.low_rank = self._make_low_rank()
        self.residual = Residual() if self.low_rank is None else self.low_rank.residual

    @property
    def held(self) -> Tensor:
        """What this rank holds of the sums at lg; of a rank alone made when it is first needed."""
        if self._held is None:
            self._held = self._zeros(self._numel)
        return self._held

    @property
    def nbytes(self) -> int:
        """Of the sums, or of the gradients in their place."""
        return self._numel * self.dtype.itemsize

    def _make_low_rank(self) -> LowRank | None:
        """What sums this buffer's gradients at the hop of low rank, if they take that hop."""
        hop, place = self._cut.low_rank, self.place
        if hop is None or not self._trained or place.world.fanout(hop.level) == 1:
            return None
        part = place.at(hop.level - 1)
        matrices = [Matrix(*found) for found in matrices_in(place.layout, part, hop.rank)]
        return LowRank(
            matrices,
            len(part),
            rank=hop.rank,
            world=place.world,
            level=hop.level,
            purposes=(G_REDUCE, G_GATHER),
            device=place.device,
        )

    @property
    def feedback_level(self) -> int | None:
        """The gradient hop whose loss is carried over to the next step."""
        if not self._trained:
            return None
        return self._cut.feedback_level if self.low_rank is None else self.low_rank.level

    def low_rank_at(self, step: int) -> LowRank | None:
        """What sums the gradients of a step at the hop of low rank; the first steps' are summed whole."""
        begun = self._cut.low_rank is not None and step >= self._cut.low_rank.first_step
        return self.low_rank if begun else None

    # -- from backward into the sums -----------------------------------------------------------------------------------

    def _add_grads(self, first: bool) -> None:
        """Add the parameters' gradients to the sums, which are whole; the first ones of a step begin them."""
        for slot, grad in zip(self.place.layout.slots, self._grads(), strict=True):
            total = self.held[slot.offset : slot.offset + slot.numel]
            if grad is not None:
                add = total.copy_ if first else total.add_
                add(self._kind.numbers(grad))
            elif first:
                total.zero_()
        if first:  # codecs that rotate blocks have left noise there, which would be summed again in every step
            self.held[self.place.padding(self._cut.lg)] = 0.0

    def forget_grads(self) -> None:
        """Of a micro-batch that is given up, what backward has left."""
        came = list(self.came)
        for _ in self._grads():
            pass
        self.came = came

    def _grads(self) -> Iterator[Tensor | None]:
        """Take the parameters' gradients away, one by one."""
        for number, parameter in enumerate(self._parameters.values()):
            with torch._C.DisableTorchFunctionSubclass():
                grad, parameter.grad = parameter.grad, None
            self.came[number] |= grad is not None
            yield grad

    def _take_grads(self) -> list[Tensor]:
        """Take the parameters' gradients away: flat pieces of N elements in all; one that is missing counts as zero."""
        layout = self.place.layout
        pieces: list[Tensor] = []
        for slot, grad in zip(layout.slots, self._grads(), strict=True):
            pieces.append(self._zeros(slot.numel) if grad is None else self._kind.numbers(grad).to(self.dtype))
        padding = layout.numel - layout.used
        return [*pieces, self._zeros(padding)] if padding else pieces

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.place.device)

    def _leave_grads(self) -> None:
        """The parameters' gradients are the sums, which `held` has no part in."""
        at = 0
        for piece in self._take_grads():
            self._left[at] = piece
            at += len(piece)

    def _set_aside(self) -> None:
        if self.feedback_level is not None:
            raise UseError(
                "a step with error feedback or low-rank sums has one last backward; pass last=True to one micro_batch and "
                "add the losses up before backward, or leave plan.wire.error_feedback and lowrank out"
            )
        self._earlier = self.reduced.clone()
        self._begun = self.complete = False
        self._left = {}

    def finish_chain(self) -> Iterator[Handle]:
        """The sums on to depth lo after all, where no micro-batch was the last; and with what was set aside."""
        if not self._begun:
            return
        if not self.complete:
            yield from self._sum_outwards(self.held, self.place.draw(G_REDUCE))
            self.complete = True
        if self._earlier is not None:
            total = self._earlier.add_(self.reduced)
            self._left, self._earlier = {}, None
            self.place.world.settle()  # others may be reading what is written over
            self._at(self._cut.lo).copy_(total)

    # -- from rank to rank ---------------------------------------------------------------------------------------------

    def reduce_chain(self, *, last: bool, tag: int) -> Iterator[Handle]:
        """This micro-batch's gradients into the sum at depth lg; after the last one on to depth lo, replicas included.

        All ranks mean the same `tag`. More may come after the last one: complete sums are then added to those that follow.
        """
        if self.complete:
            self._set_aside()
        first, self._begun, self._tag = not self._begun, True, tag
        if first and last and self._alone:
            self._leave_grads()
            self.complete = True
            return
        begins: Tensor | list[Tensor] = self.held
        draw = self.place.draw(G_REDUCE)
        if self._cut.lg >= 0:
            yield from self._sum_inwards(first, draw)
        elif first and last and self._sent_in_pieces():
            begins = self._take_grads()
        else:
            self._add_grads(first)
        if last:
            yield from self._sum_outwards(begins, draw)
            self.complete = True

    def _sum_inwards(self, first: bool, draw: Draw) -> Iterator[Handle]:
        """This micro-batch's gradients into the sums at lg, at least one level deep."""
        part: Tensor | list[Tensor] = self._take_grads()
        levels = self.place.levels(0, self._cut.lg)
        for level in levels:
            out = self.held if first and level == levels[-1] else self.place.empty(level, self.dtype)
            yield self._reduce(out, part, level, draw)
            part = out
        if part is not self.held:
            (self.held.copy_ if first else self.held.add_)(_whole(part))

    def _sent_in_pieces(self) -> bool:
        """Whether the first hop of whole sums takes gradients from where backward has left them."""
        place = self.place
        hop = next(iter(place.levels(0, place.outermost)), None)
        if hop is None or place.world.neighbours(hop) is None or hop in self._cut.grads:
            return False
        low_rank = self.low_rank_at(place.step)
        return low_rank is None or low_rank.level != hop

    def _sum_outwards(self, part: Tensor | list[Tensor], draw: Draw) -> Iterator[Handle]:
        """The sums at lg, in `part`, on to depth lo and over its replicas."""
        place = self.place
        low_rank = self.low_rank_at(place.step)
        for level in place.levels(self._cut.lg + 1, self._cut.lo):
            out = self._at(level)
            if low_rank is not None and level == low_rank.level:
                yield from low_rank.reduce(out, _whole(part), place.within(level, level - 1))
            else:
                yield self._reduce(out, part, level, draw)
            part = out
        yield from self._all_reduce(part, draw)

    def _at(self, depth: int) -> Tensor:
        """The part of the sums that this rank holds at `depth`, outside lg: what goes further is left behind."""
        return self.held[self.place.within(depth, self._cut.lg)]

    def _all_reduce(self, part: Tensor | list[Tensor], draw: Draw) -> Iterator[Handle]:
        """Sum over the replicas: reduce-scatter outwards, gather back inwards, each with the level's codec."""
        place = self.place
        levels = place.levels(self._cut.lo + 1, place.outermost)
        held = [self._at(self._cut.lo)]
        low_rank = self.low_rank_at(place.step) if levels else None
        for level in levels if low_rank is None else levels[:-1]:
            held.append(self._at(level))
            yield self._reduce(held[-1], part, level, draw)
            part = held[-1]
        if low_rank is not None:  # it sums without cutting, and is the last
            yield from low_rank.reduce(held[-1], held[-1], slice(None))
        for level in reversed(levels if low_rank is None else levels[:-1]):
            inner = held.pop()
            coding = place.coding(self._cut.grads, level, level, G_GATHER, draw)
            # A row lasts if what comes after writes the same bits over it: decoded ones are others.
            lasting = not any(inside in self._cut.grads for inside in levels if inside < level)
            yield all_gather(
                held[-1], inner, world=place.world, level=level, purpose=G_GATHER, **coding, lasting=lasting
            )

    def _reduce(self, out: Tensor, part: Tensor | list[Tensor], level: int, draw: Draw) -> Handle:
        place = self.place
        coding = place.coding(self._cut.grads, level, place.outermost, G_REDUCE, draw)
        if level == self._cut.feedback_level:
            part = self._with_residual(_whole(part), coding, place.world.fanout(level))
        to: dict[str, Any] = {"world": place.world, "level": level, "purpose": G_REDUCE, **coding}
        handle = reduce_scatter(out, part, **to, tag=self._tag)
        if isinstance(part, list):
            part.clear()  # the handle keeps what is still needed, and no longer than that
        return handle

    def _with_residual(self, part: Tensor, coding: Coding, chunks: int) -> Tensor:
        """Add what earlier steps lost to coding; what this one loses counts once the step is applied."""
        compensated = self.residual.plus(part)
        n, codec = compensated.numel() // chunks, coding["codec"]
        coded = [codec.encode(chunk, seed=coding["seed"]) for chunk in compensated.view(chunks, n)]
        sent = torch.cat([codec.decode(chunk, n, compensated.dtype) for chunk in coded])
        lost = compensated - sent
        assert self._cut.feedback_level is not None
        lost[self.place.padding(self._cut.feedback_level - 1)] = 0.0  # noise that stands for no parameter
        self.residual.leave(lost)
        return compensated

    # -- for the step --------------------------------------------------------------------------------------------------

    @property
    def reduced(self) -> Tensor:
        """The summed gradient of this rank's masters; complete after the last micro-batch's chain has landed."""
        if not self.complete:
            raise UseError(
                "there are no gradients: run forward and backward inside engine.micro_batch() before the step"
            )
        return torch.cat([*self._left.values()]) if self._left else self._at(self._cut.lo)

    def reduced_at(self, where: slice) -> Tensor:
        """A part of `reduced`, that of one parameter."""
        return self._left[where.start] if self._left else self.reduced[where]

    def squares(self) -> float:
        """Sum of the squares of `reduced` without the padding, into which codecs may put noise."""
        if self._left:
            return sum(map(sum_of_squares, self._left.values()))
        mine = self.place.at(self._cut.lo)
        return sum_of_squares(self.reduced[: max(0, min(len(mine), self.place.layout.used - mine.start))])

    def applied(self) -> None:
        """The step was taken: keep what error feedback lost, start new sums."""
        (self.low_rank or self.residual).applied()
        self.dropped()

    def dropped(self) -> None:
        """Forget the gradients and what this step would have lost."""
        self._begun = self.complete = False
        self._left, self._earlier = {}, None
        self.came = [False] * len(self.came)
        (self.low_rank or self.residual).dropped()


def _whole(part: Tensor | list[Tensor]) -> Tensor:
    return part if isinstance(part, Tensor) else torch.cat(part)
