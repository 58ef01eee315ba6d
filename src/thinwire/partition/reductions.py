"""Gradients on their way: a unit's reduction starts when its gradients are complete, behind the rest of backward.

Reductions are issued in the order in which gradients came on rank 0 in the first micro-batch, the same on all ranks.
"""

from collections import deque
from collections.abc import Callable, Sequence

from thinwire.comm.flight import Flight
from thinwire.comm.world import World
from thinwire.partition.order import of_rank_0
from thinwire.partition.unit import Unit


class Reductions:
    """The reductions of all units. `note(what, unit)` hears of what is issued, `before` is called before anything is."""

    def __init__(
        self, units: Sequence[Unit], world: World, *, note: Callable[[str, Unit], None], before: Callable[[], None]
    ) -> None:
        self._units, self._world, self._note, self._before = units, world, note, before
        joined = [(index, level.name) for index, level in enumerate(world.cluster.levels) if level.fanout > 1]
        self._slowest = joined[-1][1] if joined else None
        self._copied = {name for index, name in joined[:-1] if world.neighbours(index) is not None}
        """Levels whose hops are copies that this thread makes when it waits: it gains nothing by waiting late."""
        self._order: list[int] | None = None
        self._complete: list[int] = []
        self._issued, self._last = 0, False
        self._flights: deque[Flight] = deque()
        """In flight, oldest first."""
        self._left: Flight | None = None
        """The latest in flight, once it has left the host."""

    @property
    def agreed(self) -> bool:
        """Whether the order is known."""
        return self._order is not None

    def begin(self, *, last: bool) -> None:
        """A micro-batch begins; after the `last` one of a step sums travel on over the outer levels."""
        self._last, self._issued, self._complete = last, 0, []
        for unit in self._units:
            unit.waiting = len(unit.trained)

    def came(self, index: int) -> None:
        """All gradients of a unit are there."""
        self._complete.append(index)
        self._issue()

    def leave_host(self) -> None:
        """The next unit's backward is well under way: the latest reduction, if its hop is a copy, goes on to the links.

        Ranks need not call it alike: what has not left by then does so first of all when the next one is issued.
        """
        if self._flights and self._flights[-1] is not self._left and self._flights[-1].levels <= self._copied:
            self._left = self._flights[-1]
            self._left.advance()

    def agree(self) -> None:
        """The order from now on: as gradients came on rank 0, then the units that got none."""
        trained = [index for index, unit in enumerate(self._units) if unit.trained]
        rest = [index for index in reversed(trained) if index not in self._complete]
        self._order = of_rank_0(self._complete + rest, self._world)

    def end(self) -> None:
        """Backward is over: issue what has not been, for units without gradients too."""
        assert self._order is not None
        self._complete += [index for index in self._order if index not in self._complete]
        self._issue()

    def land(self) -> None:
        """Everything has arrived when this returns: hop by hop, so that reductions go on overlapping each other."""
        while self._flights:
            for flight in self._flights:
                flight.advance()
            self._drop_landed()

    def _issue(self) -> None:
        """Start the reductions whose turn it is: in order, as far as the units are complete."""
        if self._order is None:
            return
        self._before()
        while self._issued < len(self._order) and self._order[self._issued] in self._complete:
            unit = self._units[self._order[self._issued]]
            self._issued += 1
            self._advance_older()
            self._note("reduce", unit)
            self._flights.append(
                Flight(*(flat.sums.reduce_chain(last=self._last) for flat in unit.flats if flat.trained))
            )
            self._left = None
            self._drop_landed()

    def _advance_older(self) -> None:
        """Earlier reductions go on by a hop; the latest is let be on the slowest links, which shall never run dry."""
        self.leave_host()
        for flight in self._flights:
            if flight is self._left:
                continue
            if flight is not self._flights[-1] or self._slowest not in flight.levels:
                flight.advance()

    def _drop_landed(self) -> None:
        while self._flights and self._flights[0].landed:
            self._flights.popleft()
