"""The step program: one optimizer step as data, a tuple of operations for each rank class. Pure, no torch.

What is gathered, computed, reduced, kept, sent and waited for, and in which order a rank comes to it. The engine's order is
held against it, the simulator plays it, bytes are a sum over it. Ranks that do the same are one class: one for each
pipeline stage.

Operations stand in the order in which a rank comes to them. A collective or a transfer is issued there and travels
behind what follows; an operation begins when all that it is `after` has arrived.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from thinwire.plan.hops import (
    Buffer,
    Hop,
    Link,
    bucketed,
    flag_hops,
    gather_hops,
    header_hops,
    reduce_hops,
    refresh_hops,
    side_by_side,
    small_sum_hops,
)
from thinwire.plan.operations import (
    ALL,
    ALWAYS,
    AT_FIRST,
    ONCE,
    Body,
    Key,
    Op,
    Program,
    RankClass,
    Repeat,
    Role,
    Unit,
    When,
    cells,
    folded,
)
from thinwire.plan.passes import Pass, before, passes
from thinwire.plan.passes import after as follows


class Overlap(NamedTuple):
    """Which operations a runtime lets travel behind compute."""

    prefetch: bool = True
    reduce: bool = True
    refresh: bool = True


ENGINE = Overlap()
"""Everything travels behind compute: what the engine does."""
VOTE_EVERY = 10
"""Steps between two votes across groups."""


@dataclass(frozen=True)
class Where:
    """The ranks: links of the states axis from inner to outer, and what a pass sends to the next pipeline stage."""

    links: tuple[Link, ...]
    send: Hop | None = None
    halves: bool = True
    """Whether small sums may go in two halves (on CPUs)."""
    overlap: Overlap = ENGINE
    bucket_bytes: int = 0
    """Up to this size units travel together."""
    voters: Link | None = None
    """Groups that vote every `VOTE_EVERY` steps whether to stop."""


@dataclass(frozen=True)
class StepShape:
    """Of a plan, what the order of a step depends on beside its units."""

    micro_batches: int = 1
    keep_gathered: bool = False
    stages: int = 1
    chunks: int = 1
    lp: int = -1
    """Depth of the parameters among the links, and of the optimizer's states."""
    lo: int = -1

    @property
    def periods(self) -> list[tuple[int, int]]:
        """(passes, micro-batches) after which a stage does the same again.

        One pass while a pipeline fills or empties, a forward and a backward in between; with chunks a turn of them.
        """
        turn = self.stages * self.chunks
        return [(1, 1), (2, 1), *([(turn, self.stages), (2 * turn, self.stages)] if self.chunks > 1 else [])]


def program(shape: StepShape, stages: Sequence[Sequence[Sequence[Unit]]], where: Where) -> Program:
    """The program of a step. `stages` has for each pipeline stage the units of each of its chunks, in forward order."""
    assert len(stages) == shape.stages and all(len(chunks) == shape.chunks for chunks in stages)
    builders = [_Stage(shape, chunks, where, number) for number, chunks in enumerate(stages)]
    return Program(tuple(builder.rank_class() for builder in builders))


class _Stage:
    """Builds the operations of one rank class."""

    def __init__(self, shape: StepShape, chunks: Sequence[Sequence[Unit]], where: Where, number: int) -> None:
        self._shape, self._where, self._number = shape, where, number
        self._chunks = [tuple(chunk) for chunk in chunks]
        self._offsets = [0, *accumulate(len(chunk) for chunk in self._chunks)]
        self._units = tuple(unit for chunk in self._chunks for unit in chunk)
        self._hops: dict[tuple[str, tuple[Buffer, ...]], tuple[Hop, ...]] = {}
        self._gathered: dict[int, tuple[int, ...]] = {}
        """Units that are gathered with a unit; and reduced, and gathered after the step."""
        self._reduced: dict[int, tuple[int, ...]] = {}
        self._refreshed: dict[int, tuple[int, ...]] = {}
        for start, end in pairwise(self._offsets):
            numbers = range(start, end)
            units = {number: self._units[number] for number in numbers}
            sizes = [None if unit.resident or not unit.sharded else unit.nbytes for unit in units.values()]
            self._gathered |= self._buckets(numbers, sizes)
            trained = [number for number in reversed(numbers) if units[number].trained]
            self._reduced |= self._buckets(trained, [units[number].nbytes for number in trained])
            self._refreshed |= self._buckets(numbers, [unit.nbytes for unit in units.values()])

    def rank_class(self) -> RankClass:
        shape = self._shape
        order = passes(self._number, shape.stages, shape.micro_batches, shape.chunks)
        marked = [(each, self._is_first(each), self._is_last(each)) for each in order]
        body = [*folded(marked, self._pass_ops, _later, shape.periods), *self._end()]
        return RankClass(f"stage {self._number}", self._units, tuple(body))

    def _is_first(self, each: Pass) -> bool:
        return each.forward and each.micro_batch == 0

    def _is_last(self, each: Pass) -> bool:
        return not each.forward and each.micro_batch == self._shape.micro_batches - 1

    # -- passes --------------------------------------------------------------------------------------------------------

    def _pass_ops(self, marked: tuple[Pass, bool, bool]) -> Body:
        each, first, last = marked
        came = self._came(each)
        body = self._forward(each, first, came) if each.forward else self._backward(each, last, came)
        return (*body, *self._sends(each))

    def _came(self, each: Pass) -> tuple[Key, ...]:
        """What a pass waits for from another stage or chunk."""
        source = before(each, self._number, self._shape.stages, self._shape.chunks)
        if source is None:
            return ()
        stage, sent = source
        return (Key("send", sent.phase, sent.micro_batch, sent.chunk, stage),)

    def _sends(self, each: Pass) -> Iterator[Op]:
        if follows(each, self._number, self._shape.stages, self._shape.chunks) is not None:
            hops = () if self._where.send is None else (self._where.send,)
            key = Key("send", each.phase, each.micro_batch, each.chunk, self._number)
            yield Op("transfer", key, hops)

    def _forward(self, each: Pass, first: bool, came: tuple[Key, ...]) -> Iterator[Op | Repeat]:
        """Kept weights are gathered in the first forward of a step alone; new ones arrive in it."""
        gathers = first or not self._shape.keep_gathered
        prefetch = self._where.overlap.prefetch
        start, end = self._offsets[each.chunk : each.chunk + 2]

        def cell(number: int) -> Iterator[Op]:
            unit, together = self._units[number], self._gathered[number]
            waits = came if number == start else ()
            if gathers and unit.sharded and number == together[0] and (number == start or not prefetch):
                yield self._gather(together, "forward", each.micro_batch, first, waits)
            key = Key("gather", "forward", each.micro_batch, together[0])
            waits += (key,) if gathers and unit.sharded else ()
            following = together[-1] + 1
            if gathers and prefetch and number == together[0] and following < end and self._units[following].sharded:
                yield self._gather(self._gathered[following], "forward", each.micro_batch, first, waits)
            waits += self._new(number) if first else ()
            yield from _compute("forward", each.micro_batch, number, unit.forward_hops, waits)
            if unit.sharded and not (self._shape.keep_gathered or unit.resident):
                yield Op("free", Key("release", "forward", each.micro_batch, number))

        return cells(range(start, end), cell, +1)

    def _backward(self, each: Pass, last: bool, came: tuple[Key, ...]) -> Iterator[Op | Repeat]:
        start, end = self._offsets[each.chunk : each.chunk + 2]
        overlap = self._where.overlap

        def cell(number: int) -> Iterator[Op]:
            unit, together = self._units[number], self._gathered[number]
            waits = came if number == end - 1 else ()
            again = self._again(number)
            if again and number == together[-1] and (number == end - 1 or not overlap.prefetch):
                yield self._gather(together, "backward", each.micro_batch, False, waits)
            waits += (Key("gather", "backward", each.micro_batch, together[0]),) if again else ()
            following = together[0] - 1
            if overlap.prefetch and number == together[-1] and following >= start and self._again(following):
                yield self._gather(self._gathered[following], "backward", each.micro_batch, False, waits)
            yield from _compute("backward", each.micro_batch, number, unit.backward_hops, waits)
            if unit.trained and overlap.reduce and number == self._reduced[number][-1]:
                yield self._reduce(self._reduced[number], each.micro_batch, last)
            if unit.sharded and (last or not self._shape.keep_gathered):
                yield Op("free", Key("release", "backward", each.micro_batch, number))

        yield from cells(range(end - 1, start - 1, -1), cell, -1)
        if not overlap.reduce and any(unit.trained for unit in self._units[start:end]):
            reduced = self._reduce(tuple(range(start, end)), each.micro_batch, last)
            yield reduced
            if not last:  # nothing comes after the last one but the optimizer
                yield Op("free", Key("release", "step", each.micro_batch, start), after=(reduced.key,))

    def _again(self, number: int) -> bool:
        """Whether a unit is gathered in backward too."""
        unit = self._units[number]
        return unit.sharded and not (self._shape.keep_gathered or unit.resident)

    # -- what moves states ---------------------------------------------------------------------------------------------

    def _buckets(self, numbers: Sequence[int], sizes: Sequence[int | None]) -> dict[int, tuple[int, ...]]:
        """Of each of these units those that travel with it."""
        found, start = dict[int, tuple[int, ...]](), 0
        for count in bucketed(sizes, self._where.bucket_bytes):
            together = tuple(numbers[start : start + count])
            found |= dict.fromkeys(together, together)
            start += count
        return found

    def _gather(
        self, together: tuple[int, ...], phase: str, micro_batch: int, first: bool, waits: tuple[Key, ...]
    ) -> Op:
        """The gather before it has arrived by then, if there is one: units are gathered behind the compute of others."""
        hops = self._of("gather", together, gather_hops)
        waits += tuple(key for number in together for key in self._new(number)) if first else ()
        key = Key("gather", phase, micro_batch, together[0])
        return Op("collective", key, tuple(self._tagged(hops)), tuple(dict.fromkeys(waits)), units=_several(together))

    def _tagged(self, hops: Sequence[Hop]) -> Iterator[Hop]:
        for hop in hops:
            yield hop
            yield from header_hops([link for link in self._where.links if link.level == hop.level])

    def _reduce(self, together: tuple[int, ...], micro_batch: int, last: bool) -> Op:
        def hops(buffer: Buffer, links: Sequence[Link]) -> Iterator[Hop]:
            return reduce_hops(buffer, links, last=last)

        key = Key("reduce", "backward", micro_batch, together[0])
        made = self._of("reduce last" if last else "reduce", together, hops)
        return Op("collective", key, made, units=_several(together))

    def _refresh(self, together: tuple[int, ...]) -> Op:
        hops = self._of("refresh", together, refresh_hops)
        key = Key("refresh", "step", ONCE, together[0])
        return Op("collective", key, hops, (Key("update", "step"),), units=_several(together))

    def _new(self, number: int) -> tuple[Key, ...]:
        """The new weights of the step before."""
        if not self._units[number].trained:
            return ()
        together = self._refreshed[number] if self._where.overlap.refresh else (0,)
        return (Key("refresh", "step", ONCE, together[0], step=-1),)

    def _of(
        self,
        name: str,
        together: tuple[int, ...],
        hops: Callable[[Buffer, Sequence[Link]], Iterator[Hop]],
    ) -> tuple[Hop, ...]:
        """Of all buffers of these units; made once for all that are alike."""
        buffers = tuple(buffer for number in together for buffer in self._units[number].buffers)
        if (name, buffers) not in self._hops:
            chains = [list(hops(buffer, self._where.links)) for buffer in buffers]
            self._hops[name, buffers] = tuple(side_by_side(chains, self._where.bucket_bytes))
        return self._hops[name, buffers]

    # -- the end of a step ---------------------------------------------------------------------------------------------

    def _end(self) -> Iterator[Op | Repeat]:
        """Ranks agree on what the optimizer needs to know, update, and send the new weights out in forward order."""
        where, units = self._where, self._units
        links, halves = where.links, where.halves
        trained = [unit for unit in units if unit.trained]
        for phase, order in (("refresh", units), ("reduce", trained)):
            agreeing = _control("agree", small_sum_hops(len(order), links, halves=False), AT_FIRST)
            yield agreeing._replace(key=Key("agree", phase))
        reduced = (Key("reduce", "backward", ALL, ALL),)
        parameters = sum(buffer.parameters for unit in trained for buffer in unit.buffers)
        yield _control("flags", flag_hops(parameters, links))._replace(after=reduced)
        shards = links[: self._shape.lp + 1]
        if all(link.tagged for link in shards if link.fanout > 1):
            yield _control("order", header_hops(shards))
        else:
            yield _control("order", small_sum_hops(3, shards, halves=halves))
        yield _control("tokens", small_sum_hops(3, links, halves=halves))
        yield _control("norm", small_sum_hops(1, links[: self._shape.lo + 1], halves=halves))
        yield Op("update", Key("update", "step"), after=(Key("norm", "step"), Key("tokens", "step")))
        buckets = list(dict.fromkeys(self._refreshed.values())) if where.overlap.refresh else [tuple(range(len(units)))]
        if all(len(together) == 1 for together in buckets):
            yield from cells(range(len(units)), lambda number: iter((self._refresh((number,)),)), +1)
        else:
            yield from map(self._refresh, buckets)
        if where.voters is not None:
            vote = Hop(where.voters.level, "all_gather", "control", 1, None, 4 * (where.voters.fanout - 1))
            yield _control("vote", iter((vote,)), When(VOTE_EVERY))


def _compute(
    phase: Literal["forward", "backward"], micro_batch: int, unit: int, inside: tuple[Hop, ...], waits: tuple[Key, ...]
) -> Iterator[Op]:
    """What a unit computes, and before it (it is part of it) what ranks send each other meanwhile."""
    if inside:
        yield Op("collective", Key("activation", phase, micro_batch, unit), inside, waits)
    yield Op("compute", Key(phase, phase, micro_batch, unit), after=waits)


def _several(together: tuple[int, ...]) -> tuple[int, ...]:
    return together if len(together) > 1 else ()


def _control(role: Role, hops: Iterator[Hop], when: When = ALWAYS) -> Op:
    return Op("collective", Key(role, "step"), tuple(hops), when=when)


def _later(marked: tuple[Pass, bool, bool], micro_batches: int) -> tuple[Pass, bool, bool]:
    each, first, last = marked
    return each._replace(micro_batch=each.micro_batch + micro_batches), first, last
