"""The gradient accumulation buffer of one flat buffer: at depth lg over micro-batches, at depth lo after a step's last one.

The sums of every partition nest in the same order (inner level first, ranks in order): all partitions give the same bits.
`..._hops` are as in `thinwire.parallel.shard.flat`.

A rank that nobody adds to needs no buffer in a step of one micro-batch: gradients stay where backward has left them.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.lowrank import LowRank, Matrix, Residual
from thinwire.comm.requests import Gather, Hops, Reduce, all_reduce_hops
from thinwire.errors import UseError
from thinwire.parallel.shard.dtypes import Kind, sum_of_squares
from thinwire.parallel.shard.layout import matrices_in
from thinwire.parallel.shard.shard_spec import Coding, Draw, ShardSpec
from thinwire.plan.hops import G_GATHER, G_REDUCE


class GradAccumulation:
    """Of the gradients of `parameters`, which are trained, in the order in which they lie in the buffer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: ShardSpec, *, kind: Kind) -> None:
        self.parameters, self.spec, self._sharding, self._kind = parameters, spec, spec.sharding, kind
        self.dtype = kind.master
        self._numel = len(spec.at(self._sharding.lg))
        self._alone = not spec.levels(0, spec.outermost)
        """Whether nobody adds to this rank's gradients."""
        self._buffer = None if self._alone else self._zeros(self._numel)
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
        self.low_rank = _low_rank(spec)
        self.residual = Residual() if self.low_rank is None else self.low_rank.residual

    @property
    def buffer(self) -> Tensor:
        """What this rank holds of the sums at lg; of a rank alone made when it is first needed."""
        if self._buffer is None:
            self._buffer = self._zeros(self._numel)
        return self._buffer

    @property
    def nbytes(self) -> int:
        """Of the sums, or of the gradients in their place."""
        return self._numel * self.dtype.itemsize

    @property
    def feedback_level(self) -> int | None:
        """The gradient hop whose loss is carried over to the next step."""
        return self._sharding.feedback_level if self.low_rank is None else self.low_rank.level

    def low_rank_at(self, step: int) -> LowRank | None:
        """What sums the gradients of a step at the hop of low rank; the first steps' are summed in full."""
        begun = self._sharding.low_rank is not None and step >= self._sharding.low_rank.first_step
        return self.low_rank if begun else None

    # -- from backward into the sums -----------------------------------------------------------------------------------

    def _add_grads(self, first: bool) -> None:
        """Add the parameters' gradients to the buffer, which is unsharded; the first ones of a step begin them."""
        if first:  # the padding too: codecs that rotate blocks have left noise there, which would be summed again
            torch.cat(self._take_grads(convert=False), out=self.buffer)  # which converts without copies of its own
            return
        with torch._C.DisableTorchFunctionSubclass():
            for slot, grad in zip(self.spec.layout.slots, self._grads(), strict=True):
                if grad is not None:
                    self.buffer[slot.offset : slot.offset + slot.numel].add_(self._kind.numbers(grad))

    def forget_grads(self) -> None:
        """Of a micro-batch that is given up, what backward has left."""
        came = list(self.came)
        with torch._C.DisableTorchFunctionSubclass():
            for _ in self._grads():
                pass
        self.came = came

    def _grads(self) -> Iterator[Tensor | None]:
        """Take the parameters' gradients away, one by one, where parameters are not asked for them."""
        for number, parameter in enumerate(self.parameters.values()):
            grad, parameter.grad = parameter.grad, None
            self.came[number] |= grad is not None
            yield grad.detach() if grad is not None and grad.requires_grad else grad  # of backward(create_graph=True)

    def _take_grads(self, *, convert: bool = True) -> list[Tensor]:
        """Take the parameters' gradients away: flat pieces of N elements in all; one that is missing counts as zero.

        In the precision of the sums, or (not `convert`) in their own.
        """
        layout = self.spec.layout
        pieces: list[Tensor] = []
        with torch._C.DisableTorchFunctionSubclass():
            for slot, grad in zip(layout.slots, self._grads(), strict=True):
                piece = self._zeros(slot.numel) if grad is None else self._kind.numbers(grad)
                pieces.append(piece.to(self.dtype) if convert and piece.dtype != self.dtype else piece)
        padding = layout.numel - layout.used
        return [*pieces, self._zeros(padding)] if padding else pieces

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.spec.device)

    def _leave_grads(self) -> None:
        """The parameters' gradients are the sums, which `buffer` has no part in."""
        at = 0
        for piece in self._take_grads():
            self._left[at] = piece
            at += piece.numel()

    def _set_aside(self) -> None:
        if self.feedback_level is not None:
            raise UseError(
                "a step with error feedback or low-rank sums has one last backward; pass last=True to one micro_batch and "
                "add the losses up before backward, or leave plan.compression.error_feedback and lowrank out"
            )
        self._earlier = self.reduced.clone()
        self._begun = self.complete = False
        self._left = {}

    @property
    def unfinished(self) -> bool:
        """Whether `finish_hops` has something to do."""
        return self._begun and (not self.complete or self._earlier is not None)

    def finish_hops(self) -> Hops:
        """The sums on to depth lo after all, where no micro-batch was the last; and with what was set aside."""
        if not self.complete:
            yield from self._sum_outwards(self.buffer, self.spec.draw(G_REDUCE))
            self.complete = True
        if self._earlier is not None:
            total = self._earlier.add_(self.reduced)
            self._left, self._earlier = {}, None
            self.spec.world.settle()  # others may be reading what is written over
            self._at(self._sharding.lo).copy_(total)

    # -- from rank to rank ---------------------------------------------------------------------------------------------

    def reduce_hops(self, *, last: bool, tag: int) -> Hops:
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
        begins: Tensor | list[Tensor] = self.buffer
        draw = self.spec.draw(G_REDUCE)
        if self._sharding.lg >= 0:
            yield from self._sum_inwards(first, draw)
        elif first and last and self._sent_in_pieces():
            begins = self._take_grads()
        else:
            self._add_grads(first)
        if last:
            yield from self._sum_outwards(begins, draw)
            self.complete = True

    def _sum_inwards(self, first: bool, draw: Draw) -> Hops:
        """This micro-batch's gradients into the sums at lg, at least one level deep."""
        part: Tensor | list[Tensor] = self._take_grads()
        levels = self.spec.levels(0, self._sharding.lg)
        for level in levels:
            out = self.buffer if first and level == levels[-1] else self.spec.empty(level, self.dtype)
            yield self._reduce(out, part, level, draw)
            part = out
        if part is not self.buffer:
            (self.buffer.copy_ if first else self.buffer.add_)(_whole(part))

    def _sent_in_pieces(self) -> bool:
        """Whether the first hop of unsharded sums takes gradients from where backward has left them."""
        spec = self.spec
        hop = next(iter(spec.levels(0, spec.outermost)), None)
        if hop is None or not spec.world.reads_memory(hop) or hop in self._sharding.grads:
            return False
        low_rank = self.low_rank_at(spec.step)
        return low_rank is None or low_rank.level != hop

    def _sum_outwards(self, part: Tensor | list[Tensor], draw: Draw) -> Hops:
        """The sums at lg, in `part`, on to depth lo and over its replicas."""
        spec = self.spec
        low_rank = self.low_rank_at(spec.step)
        for level in spec.levels(self._sharding.lg + 1, self._sharding.lo):
            out = self._at(level)
            if low_rank is not None and level == low_rank.level:
                yield from low_rank.reduce(out, _whole(part), spec.within(level, level - 1))
            else:
                yield self._reduce(out, part, level, draw)
            part = out
        yield from self._all_reduce(part, draw)

    def _at(self, depth: int) -> Tensor:
        """The part of the sums that this rank holds at `depth`, outside lg: what goes further is left behind."""
        return self.buffer[self.spec.within(depth, self._sharding.lg)]

    def _all_reduce(self, part: Tensor | list[Tensor], draw: Draw) -> Hops:
        """Sum over the replicas: reduce-scatter outwards, gather back inwards, each with the level's codec."""
        spec = self.spec
        levels = spec.levels(self._sharding.lo + 1, spec.outermost)
        buffer = [self._at(self._sharding.lo)]
        low_rank = self.low_rank_at(spec.step) if levels else None
        for level in levels if low_rank is None else levels[:-1]:
            buffer.append(self._at(level))
            yield self._reduce(buffer[-1], part, level, draw)
            part = buffer[-1]
        if low_rank is not None:  # it sums without scattering, and is the last
            yield from low_rank.reduce(buffer[-1], buffer[-1], slice(None))
        for level in reversed(levels if low_rank is None else levels[:-1]):
            inner = buffer.pop()
            coding = spec.coding(self._sharding.grads, level, level, G_GATHER, draw)
            # A row lasts if what comes after writes the same bits over it: decoded ones are others.
            lasting = not any(inside in self._sharding.grads for inside in levels if inside < level)
            yield Gather(
                buffer[-1],
                inner,
                spec.world,
                level,
                G_GATHER,
                **coding,
                lasting=lasting,
                bucket_bytes=spec.bucket_bytes,
            )

    def _reduce(self, out: Tensor, part: Tensor | list[Tensor], level: int, draw: Draw) -> Reduce:
        spec = self.spec
        coding = spec.coding(self._sharding.grads, level, spec.outermost, G_REDUCE, draw)
        if level == self._sharding.feedback_level:
            part = self._with_residual(_whole(part), coding, spec.world.fanout(level))
        more: Any = {"tag": self._tag, "bucket_bytes": spec.bucket_bytes}
        return Reduce(out, part, spec.world, level, G_REDUCE, **coding, **more)

    def _with_residual(self, part: Tensor, coding: Coding, chunks: int) -> Tensor:
        """Add what earlier steps lost to coding; what this one loses counts once the step is applied."""
        compensated = self.residual.plus(part)
        n, codec = compensated.numel() // chunks, coding["codec"]
        coded = [codec.encode(chunk, seed=coding["seed"]) for chunk in compensated.view(chunks, n)]
        sent = torch.cat([codec.decode(chunk, n, compensated.dtype) for chunk in coded])
        lost = compensated - sent
        assert self._sharding.feedback_level is not None
        lost[self.spec.padding(self._sharding.feedback_level - 1)] = 0.0  # noise that stands for no parameter
        self.residual.leave(lost)
        return compensated

    # -- for the step --------------------------------------------------------------------------------------------------

    @property
    def reduced(self) -> Tensor:
        """The summed gradient of this rank's masters; complete after the last micro-batch's last hop has landed."""
        if not self.complete:
            raise UseError(
                "there are no gradients: run forward and backward inside engine.micro_batch() before the step"
            )
        return torch.cat([*self._left.values()]) if self._left else self._at(self._sharding.lo)

    def reduced_at(self, where: slice) -> Tensor:
        """A part of `reduced`, that of one parameter."""
        return self._left[where.start] if self._left else self.reduced[where]

    def squares(self) -> float:
        """Sum of the squares of `reduced` without the padding, into which codecs may put noise."""
        if self._left:
            return sum(map(sum_of_squares, self._left.values()))
        mine = self.spec.at(self._sharding.lo)
        return sum_of_squares(self.reduced[: max(0, min(len(mine), self.spec.layout.used - mine.start))])

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


def _low_rank(spec: ShardSpec) -> LowRank | None:
    """What sums a buffer's gradients at the hop of low rank, if they take that hop."""
    hop = spec.sharding.low_rank
    if hop is None or spec.world.fanout(hop.level) == 1:
        return None
    part = spec.at(hop.level - 1)
    return LowRank(
        [Matrix(*found) for found in matrices_in(spec.layout, part, hop.rank)],
        len(part),
        rank=hop.rank,
        level=hop.level,
        fanout=spec.world.fanout(hop.level),
        all_reduce=partial(all_reduce_hops, world=spec.world, level=hop.level, purposes=(G_REDUCE, G_GATHER)),
        device=spec.device,
    )
