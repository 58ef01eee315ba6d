"""A clock whose time passes only where somebody sleeps: tests wait for nothing."""

from collections.abc import Callable

from thinwire.units import SystemClock


class Jump(SystemClock):
    """Sleeping moves the time on, and does what was to happen `at` a moment that has come."""

    def __init__(self, **at: Callable[[], object]) -> None:
        """`at`: `after_5=...` happens when 5 seconds have passed."""
        self.slept_s = 0.0
        self._due = sorted((float(name.removeprefix("after_")), act) for name, act in at.items())

    def now(self) -> float:
        return self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        while self._due and self._due[0][0] <= self.slept_s:
            self._due.pop(0)[1]()
