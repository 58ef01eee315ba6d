"""Chains of collectives in flight: each hop is issued when the one before has arrived, always from one thread."""

from collections.abc import Iterator

from thinwire.comm.handle import Handle


class Flight:
    """Drives chains side by side. A chain yields a handle for each hop that it has issued; starting issues the first."""

    def __init__(self, *chains: Iterator[Handle]) -> None:
        self._under_way = _issued(chains)

    @property
    def landed(self) -> bool:
        return not self._under_way

    @property
    def levels(self) -> set[str]:
        """Names of the levels whose links the hops in flight are on."""
        return {handle.level for _, handle in self._under_way if handle.level is not None}

    def advance(self) -> float:
        """Wait for the hop in flight of every chain and issue its next one, if there is one; seconds waited."""
        going_on, waited_s = [], 0.0
        for chain, handle in self._under_way:
            waited_s += handle.wait()
            going_on += _issued((chain,))
        self._under_way = going_on
        return waited_s

    def land(self) -> float:
        """Advance to the end; seconds waited."""
        waited_s = 0.0
        while not self.landed:
            waited_s += self.advance()
        return waited_s


def _issued(chains: tuple[Iterator[Handle], ...]) -> list[tuple[Iterator[Handle], Handle]]:
    """The chains that have a next hop, with it."""
    return [(chain, handle) for chain in chains if (handle := next(chain, None)) is not None]
