"""The step program: one optimizer step as data, a tuple of operations for each rank class. Pure, no torch.

What is gathered, computed, reduced, kept, sent and waited for, and in which order a rank comes to it. The engine's order is
held against it, the simulator plays it, bytes are a sum over it. Ranks that do the same are one class: one for each
pipeline stage.

Operations stand in the order in which a rank comes to them. A collective or a transfer is issued there and travels
behind what follows; an operation begins when all that it is `after` has arrived.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from thinwire.plan.hops import (
    Buffer,
    Hop,
    Link,
    flag_hops,
    gather_hops,
    header_hops,
    reduce_hops,
    refresh_hops,
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
        start, chunk = self._offsets[each.chunk], self._chunks[each.chunk]

        def cell(index: int) -> Iterator[Op]:
            unit, number = chunk[index], start + index
            waits = came if index == 0 else ()
            if gathers and unit.sharded and (index == 0 or not prefetch):
                yield self._gather(number, "forward", each.micro_batch, first, waits)
            waits += (Key("gather", "forward", each.micro_batch, number),) if gathers and unit.sharded else ()
            following = index + 1 < len(chunk) and chunk[index + 1].sharded
            if gathers and following and prefetch:
                yield self._gather(number + 1, "forward", each.micro_batch, first, waits)
            waits += self._new(unit, number) if first else ()
            yield from _compute("forward", each.micro_batch, number, unit.forward_hops, waits)
            if unit.sharded and not (self._shape.keep_gathered or unit.resident):
                yield Op("free", Key("release", "forward", each.micro_batch, number))

        return cells(range(len(chunk)), cell, +1)

    def _backward(self, each: Pass, last: bool, came: tuple[Key, ...]) -> Iterator[Op | Repeat]:
        start, chunk = self._offsets[each.chunk], self._chunks[each.chunk]
        overlap = self._where.overlap
        end = len(chunk) - 1
        again = [unit.sharded and not (self._shape.keep_gathered or unit.resident) for unit in chunk]

        def cell(index: int) -> Iterator[Op]:
            unit, number = chunk[index], start + index
            waits = came if index == end else ()
            if again[index] and (index == end or not overlap.prefetch):
                yield self._gather(number, "backward", each.micro_batch, False, waits)
            waits += (Key("gather", "backward", each.micro_batch, number),) if again[index] else ()
            if index > 0 and again[index - 1] and overlap.prefetch:
                yield self._gather(number - 1, "backward", each.micro_batch, False, waits)
            yield from _compute("backward", each.micro_batch, number, unit.backward_hops, waits)
            if unit.trained and overlap.reduce:
                yield self._reduce((number,), each.micro_batch, last)
            if unit.sharded and (last or not self._shape.keep_gathered):
                yield Op("free", Key("release", "backward", each.micro_batch, number))

        yield from cells(range(end, -1, -1), cell, -1)
        if not overlap.reduce and any(unit.trained for unit in chunk):
            reduced = self._reduce(range(start, start + len(chunk)), each.micro_batch, last)
            yield reduced
            if not last:  # nothing comes after the last one but the optimizer
                yield Op("free", Key("release", "step", each.micro_batch, start), after=(reduced.key,))

    # -- what moves states ---------------------------------------------------------------------------------------------

    def _gather(self, number: int, phase: str, micro_batch: int, first: bool, waits: tuple[Key, ...]) -> Op:
        """The gather before it has arrived by then, if there is one: a unit is gathered behind the compute of another."""
        hops = self._of("gather", number, self._tagged)
        waits += self._new(self._units[number], number) if first else ()
        return Op("collective", Key("gather", phase, micro_batch, number), hops, waits)

    def _tagged(self, buffer: Buffer) -> Iterator[Hop]:
        links = self._where.links
        yield from gather_hops(buffer, links)
        yield from header_hops(links[: buffer.lp + 1])

    def _reduce(self, numbers: Sequence[int], micro_batch: int, last: bool) -> Op:
        links = self._where.links
        name = "reduce last" if last else "reduce"
        hops = [self._of(name, number, lambda buffer: reduce_hops(buffer, links, last=last)) for number in numbers]
        key = Key("reduce", "backward", micro_batch, numbers[0])
        return Op("collective", key, tuple(hop for each in hops for hop in each), units=len(numbers))

    def _refresh(self, number: int) -> Op:
        links = self._where.links
        return Op(
            "collective",
            Key("refresh", "step", ONCE, number),
            self._of("refresh", number, lambda buffer: refresh_hops(buffer, links)),
            (Key("update", "step"),),
        )

    def _new(self, unit: Unit, number: int) -> tuple[Key, ...]:
        """The new weights of the step before."""
        if not unit.trained:
            return ()
        return (Key("refresh", "step", ONCE, number if self._where.overlap.refresh else 0, step=-1),)

    def _of(self, name: str, number: int, hops: Callable[[Buffer], Iterator[Hop]]) -> tuple[Hop, ...]:
        """Of all buffers of a unit; made once for all units that are alike."""
        buffers = self._units[number].buffers
        if (name, buffers) not in self._hops:
            self._hops[name, buffers] = tuple(hop for buffer in buffers for hop in hops(buffer))
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
        if where.overlap.refresh:
            yield from cells(range(len(units)), lambda number: iter((self._refresh(number),)), +1)
        else:
            every = tuple(hop for number in range(len(units)) for hop in self._refresh(number).hops)
            yield self._refresh(0)._replace(hops=every, units=len(units))
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


def _control(role: Role, hops: Iterator[Hop], when: When = ALWAYS) -> Op:
    return Op("collective", Key(role, "step"), tuple(hops), when=when)


def _later(marked: tuple[Pass, bool, bool], micro_batches: int) -> tuple[Pass, bool, bool]:
    each, first, last = marked
    return each._replace(micro_batch=each.micro_batch + micro_batches), first, last
