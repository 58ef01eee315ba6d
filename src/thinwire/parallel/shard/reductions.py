"""Gradients on their way: a unit's reduction starts when its gradients are complete, behind the rest of backward.

Reductions are issued in the order in which gradients came on rank 0 in the first micro-batch, the same on all ranks.
"""

from collections import deque
from collections.abc import Callable, Sequence

from thinwire.comm.driver import Driver
from thinwire.comm.world import World
from thinwire.parallel.shard.guard import refuse_second
from thinwire.parallel.shard.order import CallOrder, Tags, of_rank_0
from thinwire.parallel.shard.unit import Unit
from thinwire.plan.hops import bucketed


class Reductions:
    """The reductions of all units. `note(what, units)` hears of what is issued, `before` is called before anything is."""

    def __init__(
        self,
        units: Sequence[Unit],
        world: World,
        tags: Tags,
        *,
        bucket_bytes: int,
        note: Callable[[str, Sequence[Unit]], None],
        before: Callable[[], None],
    ) -> None:
        self._units, self._world, self._tags, self._note, self._before = units, world, tags, note, before
        joined = [(index, level.name) for index, level in enumerate(world.cluster.levels) if level.fanout > 1]
        self._slowest = joined[-1][1] if joined else None
        self._copied = {name for index, name in joined[:-1] if world.reads_memory(index)}
        """Levels whose hops are copies that this thread makes when it waits: it gains nothing by waiting late."""
        self._bucket_bytes = bucket_bytes
        self._order: list[int] | None = None
        self._together: dict[int, int] = {}
        """Where a bucket of units that travel together begins in the order, and how many they are."""
        self._complete: dict[int, None] = {}
        """Units whose gradients are all there, in the order in which they came."""
        self._idle: list[int] = []
        """Units that expect no gradient, while backward has yet to pass them."""
        self._issued, self._last = 0, False
        self._number = 0
        """Of the micro-batch: a rank that has left one out takes no other rank's sums for its own."""
        self._flights: deque[Driver] = deque()
        """In flight, oldest first."""
        self._left: Driver | None = None
        """The latest in flight, once it has left the host."""

    def begin(self, *, last: bool) -> None:
        """A micro-batch begins; after the `last` one of a step sums travel on over the outer levels."""
        if self._last:  # more comes in a step whose sums were thought to be over, or a new step begins
            self.land()
        self._last = last
        self._number += 1
        self._open()

    def _open(self) -> None:
        self._issued, self._complete, self._idle = 0, {}, []
        for unit in self._units:
            unit.waiting, unit.hidden, unit.summed = len(unit.trained), 0, False

    @property
    def begun(self) -> bool:
        """Whether gradients of this micro-batch have been taken away."""
        return self._issued > 0

    def expect(self, counts: Sequence[int], *, nested: bool) -> None:
        """A backward begins, in which so many trained parameters of each unit will get a gradient.

        Of a sharded unit that expects none, whatever other ranks' graphs have of it: its turn comes when backward
        passes it, as where gradients do come, so that ranks gather and reduce in one order; that of a resident one
        comes at once. What a forward has hidden from autograd comes in `nested` backwards of recomputed forwards; who
        knows how many there are of a unit that was hidden more than once, or that is recomputed piece by piece
        (reversible layers).
        """
        for index, (unit, count) in enumerate(zip(self._units, counts, strict=True)):
            if nested and count and self._take_back(index):
                unit.nests, unit.hidden = True, 1
            if nested or unit.hidden:
                if count:
                    unit.waiting = count if nested and unit.hidden == 1 and count == len(unit.trained) else None
            else:
                unit.waiting = count or None
                if not count and unit.sharded and unit.trained:
                    if unit.resident:
                        self._complete[index] = None
                    else:
                        self._idle.append(index)
        self._issue()

    def passed(self, calls: CallOrder[Unit]) -> None:
        """Backward has come through some calls: units that it has come past get no gradient any more."""
        over = [index for index in self._idle if calls.has_passed(self._units[index])]
        if over:
            self._idle = [index for index in self._idle if index not in over]
            self._complete |= dict.fromkeys(over)
            self._issue()

    def _take_back(self, index: int) -> bool:
        """A unit that was thought complete is not, if its reduction has not been issued; so the first micro-batch learns."""
        thought = index in self._complete and index not in (self._order or [])[: self._issued]
        if thought:
            del self._complete[index]
        return thought

    def came(self, index: int) -> None:
        """A gradient of a unit is there. Raises UseError if the unit's have been taken away already."""
        unit = self._units[index]
        if index in self._complete:
            refuse_second(unit.label)
        if unit.waiting is not None:
            unit.waiting -= 1
        if unit.waiting == 0:
            self._complete[index] = None
            self._issue()
        else:
            self.leave_host()

    def leave_host(self) -> None:
        """The next unit's backward is well under way: the latest reduction, if its hop is a copy, goes on to the links.

        Ranks need not call it alike: what has not left by then does so first of all when the next one is issued.
        """
        if not (self._copied and self._flights) or self._flights[-1] is self._left:
            return
        if self._flights[-1].levels <= self._copied:
            self._left = self._flights[-1]
            with self._tags.told():
                self._left.advance()

    def end(self) -> None:
        """Backward is over: issue what has not been, for units without gradients too; the first time, agree on the order.

        The order is that in which gradients came on rank 0, then come the units that got none.
        """
        if self._order is None:
            trained = [index for index, unit in enumerate(self._units) if unit.trained]
            rest = [index for index in reversed(trained) if index not in self._complete]
            self._order = of_rank_0([*self._complete, *rest], self._world)
            start = 0
            for count in bucketed([self._units[index].nbytes for index in self._order], self._bucket_bytes):
                self._together[start] = count
                start += count
        self._complete |= dict.fromkeys(self._order)
        self._issue()

    def again(self) -> None:
        """Another backward of the same micro-batch begins: what the one before has summed is added to."""
        self.end()
        self.land()
        hidden = [unit.hidden for unit in self._units]
        self._open()
        for unit, count in zip(self._units, hidden, strict=True):
            unit.hidden = count

    def drop(self) -> None:
        """What is under way is waited for, and forgotten with the gradients of the micro-batch."""
        self.land()
        self._complete = dict.fromkeys(range(len(self._units)))

    def finish(self) -> None:
        """The sums are those of the step when this returns, whether or not a micro-batch said that it was the last."""
        self.land()
        for index in self._order or ():
            unfinished = [grads for grads in self._units[index].grads.values() if grads.unfinished]
            if unfinished:
                Driver(*(grads.finish_hops() for grads in unfinished)).finish()
        self._world.settle()

    def land(self) -> None:
        """Everything has arrived when this returns: hop by hop, so that reductions go on overlapping each other."""
        with self._tags.told():
            while self._flights:
                for flight in self._flights:
                    flight.advance()
                self._drop_landed()
        self._world.settle()

    def _issue(self) -> None:
        """Start the reductions whose turn it is: in order, as far as the units are complete."""
        if self._order is None:
            return
        self._before()
        while self._issued < len(self._order):
            together = self._order[self._issued : self._issued + self._together[self._issued]]
            if not all(index in self._complete for index in together):
                return
            self._issued += len(together)
            units = [self._units[index] for index in together]
            self._advance_older()
            self._note("reduce", units)
            tag = self._tags.reduction(together[0], self._number)
            grads = [each for unit in units for each in unit.grads.values()]
            self._flights.append(Driver(*(each.reduce_hops(last=self._last, tag=tag) for each in grads)))
            for unit in units:
                unit.summed = True
                unit.watch()
            self._left = None
            self._drop_landed()

    def _advance_older(self) -> None:
        """Earlier reductions go on by a hop; the latest stays on the slowest links, which must never run dry."""
        self.leave_host()
        for flight in self._flights:
            if flight is self._left:
                continue
            if flight is not self._flights[-1] or self._slowest not in flight.levels:
                with self._tags.told():
                    flight.advance()

    def _drop_landed(self) -> None:
        while self._flights and self._flights[0].finished:
            self._flights.popleft()
