"""The course of a micro-batch: which units its forward called, and how far backward has come back through them.

Backward passes a unit's calls in the reverse order of forward, on every rank, also where no gradient comes on one of them:
so ranks that share weights gather the same ones in the same order. A forward that is recomputed in backward takes the
place of what backward has come through already. Pure.
"""

from collections.abc import Iterator

from thinwire.partition.unit import Unit


class Course:
    """Calls are numbered in the order of forward."""

    def __init__(self) -> None:
        self._calls: list[Unit] = []
        self._first: dict[Unit, int] = {}
        self._position = 0
        """Calls from here on are those that backward has come through."""

    def begin(self) -> None:
        """A micro-batch begins."""
        self._calls, self._first, self._position = [], {}, 0

    def called(self, unit: Unit, *, again: bool) -> int:
        """A unit was called, in forward or (`again`) in a recomputed one; the number of the call."""
        if again and self._position < len(self._calls):
            del self._calls[self._position :]
            self._first = {}
            for number, call in enumerate(self._calls):
                self._first.setdefault(call, number)
        self._first.setdefault(unit, len(self._calls))
        self._calls.append(unit)
        self._position = len(self._calls)
        return self._position - 1

    def again(self) -> None:
        """Another backward begins at the end."""
        self._position = len(self._calls)

    def back_to(self, number: int) -> Iterator[Unit]:
        """Backward has come to a call: it and those that have been passed over, latest first."""
        while self._position > number:
            self._position -= 1
            yield self._calls[self._position]

    def is_over(self, unit: Unit) -> bool:
        """Whether backward has come through all calls of a unit, and past the first."""
        return self._first.get(unit, self._position + 1) > self._position

    def has_passed(self, unit: Unit) -> bool:
        """Whether a unit was called, and backward is past all its calls."""
        return unit in self._first and self.is_over(unit)
