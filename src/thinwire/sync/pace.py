"""No group goes more than `lead` steps ahead of the slowest one: bounded staleness (Ho et al., NeurIPS 2013).

After every step each rank tells those it exchanges with that the step is over, and waits for what they said `lead` steps
before. Groups that are a little faster than others then wait a little in every step, where a round would have them wait
for all of it in one.
"""

from collections import deque
from collections.abc import Collection

from thinwire.comm.flight import Flight
from thinwire.comm.world import World
from thinwire.sync.exchange import Clique, beat


class Pace:
    """What this rank has told and heard; nothing is told without a `lead`. Every rank calls `keep` after the same steps."""

    def __init__(self, lead: int | None, world: World) -> None:
        self._lead, self._world = lead, world
        self._told: deque[Flight] = deque()
        self._waited_s = 0.0

    def keep(self, cliques: Collection[Clique]) -> None:
        """A step is over: say so to `cliques`, and wait for those that are more than `lead` steps behind."""
        if self._lead is not None:
            self._told.append(Flight(*(beat(clique=clique, world=self._world) for clique in cliques)))
            self._hear(self._lead)

    def settle(self) -> None:
        """Wait until everybody has come as far as this rank."""
        self._hear(0)

    def waited_s(self) -> float:
        """Seconds for which this rank has waited since it was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _hear(self, ahead: int) -> None:
        while len(self._told) > ahead:
            self._waited_s += self._told.popleft().land()
