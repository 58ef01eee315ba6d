"""Full weights when they are used: gathered before, the next unit's on their way behind; new ones after each step.

Gathers are issued in the order of use. All-gathers after a step (`regather`) are issued, and landed, in the order in
which rank 0's first forward used units: their inner hops are issued as they land, and forwards may differ between ranks
that do not share weights.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch

from thinwire.comm.driver import Driver
from thinwire.comm.world import World
from thinwire.parallel.shard.order import CallOrder, GatherOrder, Tags, of_rank_0
from thinwire.parallel.shard.unit import Unit
from thinwire.plan.hops import bucketed


class Weights:
    """The weights of all units; `depth` is where they are sharded. Units of up to `bucket_bytes` travel together.

    `note(what, units)` hears of what is issued.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        world: World,
        tags: Tags,
        *,
        depth: int,
        bucket_bytes: int,
        note: Callable[[str, Sequence[Unit]], None],
    ) -> None:
        self._units, self._world, self._tags, self._note = units, world, tags, note
        self._bucket_bytes = bucket_bytes
        self._sharded = any(unit.sharded for unit in units)
        self._number = {unit: number for number, unit in enumerate(units)}
        self.used: list[Unit] = []
        """Units in order of first use in forward."""
        self._place: dict[Unit, int] = {}
        """Where each of them stands there."""
        self._regather_order = list(range(len(units)))
        """The order of all-gathers after a step, agreed on after the first micro-batch."""
        self._regather_counts = [1] * len(units)
        """How many of them travel together."""
        self._regathering: deque[list[Unit]] = deque()
        """Units whose new weights are on their way, oldest first; those that travel together."""
        self._buckets: dict[Unit, tuple[Unit, ...]] = {}
        """Units that are gathered together, by each of them; one that is missing is gathered alone."""
        self._here: dict[Unit, None] = {}
        """Sharded units that are gathered, oldest first."""
        self._passing: list[Unit] = []
        """Of those, the ones that are here because somebody looked at them."""
        self._gathers = GatherOrder(world, depth, tags)
        self._last = False
        self.agreed = False
        """Whether the order of all-gathers after a step is known."""
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
        if unit not in self._place:
            self._place[unit] = len(self.used)
            self.used.append(unit)

    def use(self, unit: Unit, *, alone: bool = False) -> None:
        """The unit's weights are full when this returns, and those of its bucket, unless it is to come `alone`."""
        if not unit.gathered and unit.gathering is None:
            self._start_gather((unit,) if alone else self._bucket(unit))
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
            self.use(unit, alone=not stays)
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
        """Start gathering what comes next in this direction (+1: forward, -1: backward)."""
        place = self._place.get(unit) if self._sharded else None
        if place is None:
            return
        here, place = self._bucket(unit), place + direction
        while 0 <= place < len(self.used) and self.used[place] in here:
            place += direction
        if 0 <= place < len(self.used):
            following = self.used[place]
            if not following.gathered and following.gathering is None:
                self._start_gather(self._bucket(following))

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
        """Give a unit's full weights up, if they were gathered and have arrived."""
        if unit in self._here and unit.gathering is None:
            for flat in unit.flats:
                flat.release()
            del self._here[unit]
            unit.watch()

    def check(self) -> None:
        """Raises UseError if ranks that share weights have gathered different units in this step, or in other orders."""
        self._gathers.check()

    def _kept(self, unit: Unit) -> bool:
        """Whether the unit's weights stay full for the next micro-batch: they do not change before the step."""
        return unit.keep and not self._last

    def _bucket(self, unit: Unit) -> tuple[Unit, ...]:
        return self._buckets.get(unit, (unit,))

    def _start_gather(self, units: Sequence[Unit]) -> None:
        """Of those of these units that are not here."""
        together = [each for each in units if not each.gathered and each.gathering is None]
        for each in together:
            self.land_regather(each)
        self._note("gather", together)
        tag = self._gathers.tag([self._number[each] for each in together])
        gathering = Driver(*(flat.gather_hops(tag) for each in together for flat in each.flats))
        for each in together:
            each.gathering = gathering

    def _land_gather(self, unit: Unit) -> None:
        gathering = unit.gathering
        if gathering is None:
            return
        with self._tags.told():
            gathering.finish()
        for each in self._bucket(unit):
            if each.gathering is gathering:
                each.gathering = None
                self._here[each] = None
                each.watch()

    # -- after a step --------------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """From now on all-gathers after a step go in the order in which rank 0's forward used units; then come the others.

        Those that travel together are found in it, and of gathers in the order of this rank's forward, which is that of
        all ranks that share its weights.
        """
        used = [self._number[unit] for unit in self.used]
        order = of_rank_0([*used, *(index for index in self._regather_order if index not in used)], self._world)
        self._regather_order, self.agreed = order, True
        self._regather_counts = bucketed([self._units[index].nbytes for index in order], self._bucket_bytes)
        sizes = [None if unit.resident or not unit.sharded else unit.nbytes for unit in self.used]
        start = 0
        for count in bucketed(sizes, self._bucket_bytes):
            together = tuple(self.used[start : start + count])
            self._buckets |= dict.fromkeys(together, together)
            start += count

    def regather_all(self, *, exact: bool) -> None:
        """The masters have changed: send the new weights out, outermost level first, in forward order."""
        start = 0
        for count in self._regather_counts:
            self.regather([self._units[index] for index in self._regather_order[start : start + count]], exact=exact)
            start += count

    def regather(self, units: list[Unit], *, exact: bool) -> None:
        """Send the new weights of units out together: coded as after a step, or (`exact`) as they are."""
        for unit in units:
            self.land_regather(unit)
            self._land_gather(unit)
            self.release(unit)
        self._world.settle()  # others may be reading the old ones
        self._note("refresh", units)
        flats = [flat for unit in units for flat in unit.flats if (exact or flat.trained) and not flat.follows]
        if not flats:
            return
        regathering = Driver(*(flat.regather_hops(exact=exact) for flat in flats))
        self._regathering.append(units)
        for unit in units:
            unit.regathering = regathering
            unit.watch()

    def land_regather(self, unit: Unit) -> None:
        """The unit's new weights have arrived when this returns, and those sent before them."""
        while unit.regathering is not None:
            older = self._regathering.popleft()
            assert older[0].regathering is not None
            older[0].regathering.finish()
            for each in older:
                each.regathering = None
                each.watch()

    def land_regathers(self) -> None:
        """All new weights have arrived when this returns."""
        while self._regathering:
            self.land_regather(self._regathering[-1][0])
