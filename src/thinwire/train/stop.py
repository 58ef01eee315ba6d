"""Stopping on request: the first signal finishes the step and saves, the second one leaves at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED_STATUS = 130


@contextmanager
def held_for_children() -> Iterator[None]:
    """Processes started inside keep stop signals waiting until they `listen`: they may come before they can."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_as_usual() -> None:
    """End this process by the stop signals that were `held_for_children`, as every process does that does not `listen`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopRequest:
    """Remembers that a stop was asked for. The loop reads `asked`; all ranks agree on it before they act."""

    def __init__(self) -> None:
        self.asked = False
        self.by = ""
        self.at_once = False
        """By a signal that asks for the end of the process, not for a stop some time before it."""

    def listen(self) -> None:
        """Take over the stop signals of this process. Call from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(INTERRUPTED_STATUS)
        self.asked = True
        self.at_once = self.at_once or number != signal.SIGUSR1
        self.by = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Inside, stop signals are remembered instead of ending this process. From the main thread."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request = StopRequest()
    request.listen()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
