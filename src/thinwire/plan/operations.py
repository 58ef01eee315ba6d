"""Operations of a step program: what a rank computes, sends and waits for, as data. Pure, no torch.

Equal stretches that follow one another, of micro-batches or of blocks, are folded into a `Repeat`, so that a large model's
program stays small.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from thinwire.plan.hops import G_GATHER, G_REDUCE, P_GATHER, P_REFRESH, Buffer, Hop

Kind = Literal["compute", "collective", "transfer", "update", "free"]
Role = Literal[
    "gather", "forward", "backward", "reduce", "refresh", "release", "send", "flags", "order", "tokens", "norm", "update",
    "activation", "agree", "vote", "outer",
]  # fmt: skip
ONCE, ALL = -1, -2
"""In the place of a micro-batch or a unit: once a step, of none; and every one."""


class Key(NamedTuple):
    """An operation's name in its step. `unit` is a chunk's number where a pass is sent."""

    role: Role
    phase: str
    micro_batch: int = ONCE
    unit: int = ONCE
    stage: int = ONCE
    """Of another rank class; its own otherwise."""
    step: int = 0
    """-1: of the step before."""

    def moved(self, micro_batches: int, units: int) -> "Key":
        role, phase, micro_batch, unit, stage, step = self
        if micro_batch >= 0:
            micro_batch += micro_batches
        if unit >= 0 and stage == ONCE:  # the number of a chunk stays
            unit += units
        return Key(role, phase, micro_batch, unit, stage, step)


class When(NamedTuple):
    """After which steps, counted from 1: those that leave `rest` when divided by `every`; 0: in a run's first alone."""

    every: int = 1
    rest: int = 0

    def times(self, first: int, steps: int, *, start: int = 0) -> int:
        """In how many of `steps` steps from `first` on, counted from 0; a run began at `start`."""
        if self.every == 0:
            return int(first <= start < first + steps)
        return (first + steps - self.rest) // self.every - (first - self.rest) // self.every


ALWAYS, AT_FIRST = When(), When(0)


class Op(NamedTuple):
    """One operation of a rank."""

    kind: Kind
    key: Key
    hops: tuple[Hop, ...] = ()
    """Of each flat buffer in turn, in the order in which they follow one another."""
    after: tuple[Key, ...] = ()
    when: When = ALWAYS
    units: tuple[int, ...] = ()
    """Of these units together, of which the key names the first; without them of that alone."""

    @property
    def sent_bytes(self) -> int:
        return sum(hop.sent_bytes for hop in self.hops)

    def moved(self, micro_batches: int, units: int) -> "Op":
        kind, key, hops, after, when, together = self
        after = tuple([key.moved(micro_batches, units) for key in after])
        together = tuple([unit + units for unit in together]) if units else together
        return Op(kind, key.moved(micro_batches, units), hops, after, when, together)

    @property
    def of_units(self) -> tuple[int, ...]:
        return self.units or (self.key.unit,)


class Repeat(NamedTuple):
    """`body`, `times` times: each time the numbers of micro-batches and units in it grow by so many."""

    body: tuple["Op | Repeat", ...]
    times: int
    micro_batches: int
    units: int

    def moved(self, micro_batches: int, units: int) -> "Repeat":
        return self._replace(body=tuple(item.moved(micro_batches, units) for item in self.body))


Body = tuple[Op | Repeat, ...]
Bytes = dict[int, dict[str, int]]
"""Level -> purpose -> bytes."""


class Unit(NamedTuple):
    """A unit of the model: states that move together."""

    name: str
    buffers: tuple[Buffer, ...]
    resident: bool = False
    """Its weights stay from forward to backward, as no single module spans all their uses."""
    forward_hops: tuple[Hop, ...] = ()
    """What ranks that share the work of the unit send each other inside its forward: activations."""
    backward_hops: tuple[Hop, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of its full weights, as gradients are summed."""
        return sum(buffer.numel * buffer.grad_bytes for buffer in self.buffers)

    @property
    def sharded(self) -> bool:
        return any(buffer.lp >= 0 for buffer in self.buffers)

    @property
    def trained(self) -> bool:
        return any(buffer.trained for buffer in self.buffers)


@dataclass(frozen=True)
class RankClass:
    """Ranks with the same program. `units` are those that it numbers."""

    name: str
    units: tuple[Unit, ...]
    body: Body

    def ops(self) -> Iterator[Op]:
        """Every operation in turn, unfolded."""
        return _unfolded(self.body)


@dataclass(frozen=True)
class Program:
    """A step of all rank classes."""

    classes: tuple[RankClass, ...]

    @property
    def digest(self) -> str:
        """Equal digests mean equal programs."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def sent_bytes(self, rank_class: int = 0, *, first: int = 0, steps: int = 1, start: int = -1) -> Bytes:
        """level -> purpose -> bytes that a rank of a class sends in `steps` steps from `first` on, counted from 0.

        A run that began at step `start` does in that one what is done once; by default none of these does.
        """
        found: Bytes = {}
        for op, a_step in _counted(self.classes[rank_class].body, 1):
            times = a_step * op.when.times(first, steps, start=start)
            for hop in op.hops if times else ():
                of_level = found.setdefault(hop.level, {})
                of_level[hop.purpose] = of_level.get(hop.purpose, 0) + times * hop.sent_bytes
        return {level: dict(sorted(found[level].items(), key=_place)) for level in sorted(found)}


_ORDER = (P_GATHER, P_REFRESH, G_REDUCE, G_GATHER)


def _place(purpose: tuple[str, int]) -> int:
    return _ORDER.index(purpose[0]) if purpose[0] in _ORDER else len(_ORDER)


def _counted(body: Body, times: int) -> Iterator[tuple[Op, int]]:
    for item in body:
        if isinstance(item, Repeat):
            yield from _counted(item.body, times * item.times)
        else:
            yield item, times


def _unfolded(body: Body) -> Iterator[Op]:
    for item in body:
        if isinstance(item, Op):
            yield item
            continue
        once = list(_unfolded(item.body))
        for time in range(item.times):
            yield from [op.moved(time * item.micro_batches, time * item.units) for op in once] if time else once


# -- folding -----------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")


def cells(numbers: Sequence[int], cell: Callable[[int], Iterator[Op]], step: int) -> Iterator[Op | Repeat]:
    """The cells of units in turn; equal ones, but for the units' numbers, are folded."""
    made = [tuple(cell(number)) for number in numbers]
    start = 0
    while start < len(made):
        end = start + 1
        while end < len(made) and made[end] == tuple(op.moved(0, step) for op in made[end - 1]):
            end += 1
        if end - start > 1:
            yield Repeat(made[start], end - start, 0, step)
        else:
            yield from made[start]
        start = end


def folded(
    items: Sequence[Item],
    make: Callable[[Item], Body],
    moved: Callable[[Item, int], Item],
    periods: Sequence[tuple[int, int]],
) -> Iterator[Op | Repeat]:
    """What `make` makes of each item in turn.

    `periods` are (n, micro-batches): where the next n items come again so many micro-batches later, they repeat; of
    several periods the one that covers most counts.
    """
    start = 0
    while start < len(items):
        found = ((_times(items, start, n, by, moved), n, by) for n, by in periods)
        times, n, by = max(found, key=lambda each: (each[0] > 1) * each[0] * each[1])
        n = n if times > 1 else 1
        body = tuple(op for item in items[start : start + n] for op in make(item))
        if times > 1:
            yield Repeat(body, times, by, 0)
        else:
            yield from body
        start += n * times


def _times(items: Sequence[Item], start: int, n: int, by: int, moved: Callable[[Item, int], Item]) -> int:
    """How often the `n` items from `start` on come in a row, each time `by` micro-batches later."""
    if start + n > len(items):
        return 1
    times = 1
    while start + (times + 1) * n <= len(items) and all(
        items[start + times * n + i] == moved(items[start + (times - 1) * n + i], by) for i in range(n)
    ):
        times += 1
    return times
