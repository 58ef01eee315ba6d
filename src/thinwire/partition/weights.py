"""Whole weights when they are used: gathered before, the next unit's on their way behind; new ones after each step.

Gathers are issued in the order of use. Refreshes are issued, and landed, in the order in which rank 0's first forward used
units: their inner hops are issued as they land, and forwards may differ between ranks that do not share weights.
"""

from collections import deque
from collections.abc import Callable, Sequence

from thinwire.comm.flight import Flight
from thinwire.comm.world import World
from thinwire.partition.order import GatherOrder, of_rank_0
from thinwire.partition.unit import Unit


class Weights:
    """The weights of all units; `depth` is where they are cut. `note(what, unit)` hears of what is issued."""

    def __init__(self, units: Sequence[Unit], world: World, *, depth: int, note: Callable[[str, Unit], None]) -> None:
        self._units, self._world, self._note = units, world, note
        self.used: list[Unit] = []
        """Units in order of first use in forward."""
        self._refreshes = list(range(len(units)))
        """The order of refreshes, agreed on after the first micro-batch."""
        self._refreshing: deque[Unit] = deque()
        """Units whose new weights are on their way, oldest first."""
        self._gathers = GatherOrder(world, depth)
        self._last = False

    # -- in a micro-batch ----------------------------------------------------------------------------------------------

    def begin(self, *, last: bool) -> None:
        """A micro-batch begins; `last` is the one before the optimizer's step."""
        self._last = last

    def first_use(self, unit: Unit) -> None:
        """The forward uses a unit: it is whole when this returns."""
        self.use(unit)
        if unit not in self.used:
            self.used.append(unit)

    def use(self, unit: Unit) -> None:
        """The unit's weights are whole when this returns."""
        if not unit.gathered and unit.gathering is None:
            self._start_gather(unit)
        self.land_refresh(unit)
        self._land_gather(unit)

    def prefetch(self, unit: Unit, direction: int) -> None:
        """Start gathering the unit that comes next in this direction (+1: forward, -1: backward)."""
        position = self.used.index(unit) + direction
        if not 0 <= position < len(self.used):
            return
        following = self.used[position]
        if not following.gathered and following.gathering is None:
            self._start_gather(following)

    def release_after(self, unit: Unit) -> None:
        """Backward has come to a unit: those after it are done with, unless they are used in several places."""
        if not unit.resident and unit in self.used:
            for done in self.used[self.used.index(unit) + 1 :]:
                if not (done.resident or self._kept(done)):
                    self.release(done)

    def release_all(self, *, unless_kept: bool) -> None:
        """Nothing stays gathered, or only what the next micro-batch of the step uses as it is."""
        for unit in self._units:
            self._land_gather(unit)
            if not (unless_kept and self._kept(unit)):
                self.release(unit)

    def release(self, unit: Unit) -> None:
        """Give a unit's whole weights up, unless they are on their way."""
        if unit.gathering is None:
            for flat in unit.flats:
                if flat.gathered:
                    flat.release()

    def check(self) -> None:
        """Raises UseError if ranks that share weights have gathered different units in this step, or in other orders."""
        self._gathers.check()

    def _kept(self, unit: Unit) -> bool:
        """Whether the unit's weights stay whole for the next micro-batch: they do not change before the step."""
        return unit.keep and not self._last

    def _start_gather(self, unit: Unit) -> None:
        self.land_refresh(unit)
        self._note("gather", unit)
        self._gathers.note(unit.name or "root")
        unit.gathering = Flight(*(flat.gather_chain() for flat in unit.flats))

    def _land_gather(self, unit: Unit) -> None:
        if unit.gathering is not None:
            unit.gathering.land()
            unit.gathering = None

    # -- after a step --------------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """From now on refreshes go in the order in which rank 0's forward used units; then come the others."""
        used = [self._units.index(unit) for unit in self.used]
        self._refreshes = of_rank_0([*used, *(index for index in self._refreshes if index not in used)], self._world)

    def refresh_all(self, *, exact: bool) -> None:
        """The masters have changed: send the new weights out, outermost level first, in forward order."""
        for index in self._refreshes:
            self.refresh(self._units[index], exact=exact)

    def refresh(self, unit: Unit, *, exact: bool) -> None:
        """Send a unit's new weights out: coded as after a step, or (`exact`) as they are."""
        self.land_refresh(unit)
        self._land_gather(unit)
        self.release(unit)
        self._note("refresh", unit)
        unit.refreshing = Flight(*(flat.refresh_chain(exact=exact) for flat in unit.flats if exact or flat.trained))
        self._refreshing.append(unit)

    def land_refresh(self, unit: Unit) -> None:
        """The unit's new weights have arrived when this returns, and those sent before them."""
        while unit.refreshing is not None:
            older = self._refreshing.popleft()
            assert older.refreshing is not None
            older.refreshing.land()
            older.refreshing = None

    def land_refreshes(self) -> None:
        """All new weights have arrived when this returns."""
        while self._refreshing:
            self.land_refresh(self._refreshing[-1])

    def land_refreshes_of_unused(self) -> None:
        """Units that no forward has been seen to use may be used in other ways: their weights are brought up to date."""
        for unit in self._units:
            if unit not in self.used:
                self.land_refresh(unit)
