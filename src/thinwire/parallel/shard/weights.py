"""Full weights when they are used: gathered before, the next unit's on their way behind; new ones after each step.

Gathers are issued in the order of use. All-gathers after a step (`regather`) are issued, and landed, in the order in
which rank 0's first forward used units: their inner hops are issued as they land, and forwards may differ between ranks
that do not share weights.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch

from thinwire.comm.handle import InFlight
from thinwire.comm.world import World
from thinwire.parallel.shard.order import CallOrder, GatherOrder, Tags, of_rank_0
from thinwire.parallel.shard.unit import Unit


class Weights:
    """The weights of all units; `depth` is where they are sharded. `note(what, unit)` hears of what is issued."""

    def __init__(
        self, units: Sequence[Unit], world: World, tags: Tags, *, depth: int, note: Callable[[str, Unit], None]
    ) -> None:
        self._units, self._world, self._tags, self._note = units, world, tags, note
        self._number = {unit: number for number, unit in enumerate(units)}
        self.used: list[Unit] = []
        """Units in order of first use in forward."""
        self._regather_order = list(range(len(units)))
        """The order of all-gathers after a step, agreed on after the first micro-batch."""
        self._regathering: deque[Unit] = deque()
        """Units whose new weights are on their way, oldest first."""
        self._here: dict[Unit, None] = {}
        """Sharded units that are gathered, oldest first."""
        self._passing: list[Unit] = []
        """Of those, the ones that are here because somebody looked at them."""
        self._gathers = GatherOrder(world, depth, tags)
        self._last = False
        for unit in units:
            unit.watch()

    # -- in a micro-batch ----------------------------------------------------------------------------------------------

    def begin(self, *, last: bool) -> None:
        """A micro-batch begins; `last` is the one before the optimizer's step."""
        self._last = last
        self._pass(())

    def first_use(self, unit: Unit) -> None:
        """The forward uses a unit: it is full when this returns."""
        self.use(unit)
        if unit not in self.used:
            self.used.append(unit)

    def use(self, unit: Unit) -> None:
        """The unit's weights are full when this returns."""
        if not unit.gathered and unit.gathering is None:
            self._start_gather(unit)
        self.land_regather(unit)
        self._land_gather(unit)

    def look(self, units: Sequence[Unit], *, stays: bool) -> None:
        """Parameters of these units are used outside their forward: they are full, and new, when this returns.

        They stay so to the end of the micro-batch (`stays`), or until others are looked at: a loop over all parameters
        holds one unit at a time.
        """
        self._pass(units)
        for unit in units:
            if stays:
                unit.loose = True
                unit.hidden += not torch.is_grad_enabled()
            elif not unit.gathered and unit.gathering is None:
                self._passing.append(unit)
            self.use(unit)
        if not stays:
            self._world.settle()

    def _pass(self, except_for: Collection[Unit]) -> None:
        left, self._passing = self._passing, []
        for unit in left:
            if unit in except_for:
                self._passing.append(unit)
            elif not unit.loose:
                self.release(unit)

    def prefetch(self, unit: Unit, direction: int) -> None:
        """Start gathering the unit that comes next in this direction (+1: forward, -1: backward)."""
        position = self.used.index(unit) + direction if unit in self.used else -1
        if not 0 <= position < len(self.used):
            return
        following = self.used[position]
        if not following.gathered and following.gathering is None:
            self._start_gather(following)

    def release_over(self, calls: CallOrder[Unit]) -> None:
        """Give up the units that backward has come through, unless they are used in several places."""
        for unit in list(self._here):
            if calls.is_over(unit) and not (unit.resident or unit.loose or self._kept(unit)):
                self.release(unit)

    def release_all(self, *, unless_kept: bool) -> None:
        """Nothing stays gathered, or only what the next micro-batch of the step uses as it is."""
        self._passing = []
        for unit in self._units:
            self._land_gather(unit)
            unit.loose = False
            if not (unless_kept and self._kept(unit)):
                self.release(unit)

    def release(self, unit: Unit) -> None:
        """Give a unit's full weights up, unless they are on their way."""
        if unit.gathering is None:
            for flat in unit.flats:
                flat.release()
            self._here.pop(unit, None)
            unit.watch()

    def check(self) -> None:
        """Raises UseError if ranks that share weights have gathered different units in this step, or in other orders."""
        self._gathers.check()

    def _kept(self, unit: Unit) -> bool:
        """Whether the unit's weights stay full for the next micro-batch: they do not change before the step."""
        return unit.keep and not self._last

    def _start_gather(self, unit: Unit) -> None:
        self.land_regather(unit)
        self._note("gather", unit)
        tag = self._gathers.tag(self._number[unit])
        unit.gathering = InFlight(*(flat.gather_hops(tag) for flat in unit.flats))

    def _land_gather(self, unit: Unit) -> None:
        if unit.gathering is not None:
            with self._tags.told():
                unit.gathering.finish()
            unit.gathering = None
            self._here[unit] = None
            unit.watch()

    # -- after a step --------------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """From now on all-gathers after a step go in the order in which rank 0's forward used units; then come the
        others."""
        used = [self._number[unit] for unit in self.used]
        self._regather_order = of_rank_0(
            [*used, *(index for index in self._regather_order if index not in used)], self._world
        )

    def regather_all(self, *, exact: bool) -> None:
        """The masters have changed: send the new weights out, outermost level first, in forward order."""
        for index in self._regather_order:
            self.regather(self._units[index], exact=exact)

    def regather(self, unit: Unit, *, exact: bool) -> None:
        """Send a unit's new weights out: coded as after a step, or (`exact`) as they are."""
        self.land_regather(unit)
        self._land_gather(unit)
        self.release(unit)
        self._world.settle()  # others may be reading the old ones
        self._note("refresh", unit)
        unit.regathering = InFlight(*(flat.regather_hops(exact=exact) for flat in unit.flats if exact or flat.trained))
        self._regathering.append(unit)
        unit.watch()

    def land_regather(self, unit: Unit) -> None:
        """The unit's new weights have arrived when this returns, and those sent before them."""
        while unit.regathering is not None:
            older = self._regathering.popleft()
            assert older.regathering is not None
            older.regathering.finish()
            older.regathering = None
            older.watch()

    def land_regathers(self) -> None:
        """All new weights have arrived when this returns."""
        while self._regathering:
            self.land_regather(self._regathering[-1])
