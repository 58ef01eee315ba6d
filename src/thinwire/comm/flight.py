"""A chain of collectives in flight: each hop is issued when the one before has arrived, always from one thread."""

from collections.abc import Iterator

from thinwire.comm.handle import Handle


class Flight:
    """Drives `chain`, which yields a handle for each hop that it has issued; starting it issues the first hop."""

    def __init__(self, chain: Iterator[Handle]) -> None:
        self._chain = chain
        self._handle: Handle | None = next(chain, None)

    @property
    def landed(self) -> bool:
        return self._handle is None

    def advance(self) -> None:
        """Wait for the hop in flight and issue the next one, if there is one."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = next(self._chain, None)

    def land(self) -> None:
        """Advance to the end."""
        while not self.landed:
            self.advance()
