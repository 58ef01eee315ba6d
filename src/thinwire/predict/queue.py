"""An event queue with streams, first come first served, the same every time.

A stream carries one message at a time, in the order in which all who take part have come to them: ranks that are not
equally fast come to messages in different orders, and never wait for each other's turn in a circle.
Compute goes on beside messages, slower by a factor while any stream of its rank is busy.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thinwire.files.trace import Span

Then = Callable[[], None]


class Clock:
    """Time and what is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Then]] = []
        self._number = 0
        self.events = 0

    def at(self, time: float, then: Then) -> None:
        """Call `then` at `time`; calls at the same time go in the order of asking."""
        heapq.heappush(self._due, (time, self._number, then))
        self._number += 1

    def number(self) -> int:
        """One more than the time before."""
        self._number += 1
        return self._number

    def run(self) -> float:
        """Until nothing is due; the time of the last event."""
        while self._due:
            self.now, _, then = heapq.heappop(self._due)
            self.events += 1
            then()
        return self.now


class Signal:
    """Something that happens once; what waits for it goes on then."""

    def __init__(self) -> None:
        self.done = False
        self._waiting: list[Then] = []

    def fire(self) -> None:
        assert not self.done
        self.done = True
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()

    def then(self, then: Then) -> None:
        if self.done:
            then()
        else:
            self._waiting.append(then)


@dataclass
class Message:
    """One hop: how long it takes, and the streams that it occupies together."""

    name: str
    seconds: float
    streams: list["SendStream"]
    wanted: int
    """How many streams have to come to it before it may start."""
    done: Signal = field(default_factory=Signal)
    number: int = -1
    """Of messages that everyone has come to; none before."""

    @property
    def ready(self) -> bool:
        """Whether everyone is there, and it is its turn in every stream."""
        return self.number >= 0 and all(stream.carrying is None and stream.next is self for stream in self.streams)


class SendStream:
    """One level's sends of one rank."""

    def __init__(
        self, clock: Clock, rank: int, name: str, worker: "Worker | None", log: Callable[[Span], None]
    ) -> None:
        self._clock, self._log = clock, log
        self.rank, self.name, self.worker = rank, name, worker
        self.waiting: deque[Message] = deque()
        """What the rank has come to and has not begun, in the order of coming."""
        self.carrying: Message | None = None

    def join(self, message: Message) -> None:
        """Come to `message`."""
        self.waiting.append(message)
        message.streams.append(self)
        if len(message.streams) == message.wanted:
            message.number = self._clock.number()
            if message.ready:
                _start(self._clock, message)

    @property
    def next(self) -> Message | None:
        """Of what everyone has come to, what was complete first."""
        first: Message | None = None
        for message in self.waiting:
            if message.number >= 0 and (first is None or message.number < first.number):
                first = message
        return first

    def begin(self, message: Message) -> None:
        self.waiting.remove(message)
        self.carrying = message
        if self.worker is not None:
            self.worker.beside(+1)

    def end(self, message: Message, start: float) -> None:
        self.carrying = None
        self._log(Span(self.rank, self.name, message.name, start, self._clock.now))
        if self.worker is not None:
            self.worker.beside(-1)


def _start(clock: Clock, message: Message) -> None:
    start = clock.now
    for stream in message.streams:
        stream.begin(message)
    clock.at(start + message.seconds, lambda: _end(clock, message, start))


def _end(clock: Clock, message: Message, start: float) -> None:
    for stream in message.streams:
        stream.end(message, start)
    message.done.fire()
    for stream in message.streams:
        following = stream.next if stream.waiting and stream.carrying is None else None
        if following is not None and following.ready:
            _start(clock, following)


class Worker:
    """A rank's compute: one piece of work at a time, slower while messages are under way beside it."""

    def __init__(self, clock: Clock, rank: int, slowdown: float, log: Callable[[Span], None]) -> None:
        self._clock, self._log = clock, log
        self.rank, self._rate = rank, 1.0 / (1.0 + slowdown)
        self._messages = 0
        self._left = 0.0
        self._since = 0.0
        self._turn = 0
        self._current: tuple[str, float, Then] | None = None

    def compute(self, name: str, seconds: float, then: Then) -> None:
        """Work for `seconds` (alone), then call `then`."""
        assert self._current is None
        self._current = (name, self._clock.now, then)
        self._left, self._since = seconds, self._clock.now
        self._plan()

    def beside(self, more: int) -> None:
        """A message began or ended."""
        if self._current is not None:
            self._left -= (self._clock.now - self._since) * self._speed
            self._since = self._clock.now
        before = self._messages > 0
        self._messages += more
        if self._current is not None and before != (self._messages > 0):
            self._plan()

    @property
    def _speed(self) -> float:
        return self._rate if self._messages else 1.0

    def _plan(self) -> None:
        self._turn += 1
        turn = self._turn
        self._clock.at(self._clock.now + max(0.0, self._left) / self._speed, lambda: self._finish(turn))

    def _finish(self, turn: int) -> None:
        if turn != self._turn or self._current is None:
            return  # the speed has changed since
        name, start, then = self._current
        self._current = None
        self._log(Span(self.rank, "compute", name, start, self._clock.now))
        then()


def chain(messages: Sequence[Message], streams: Sequence["SendStream"], done: Signal) -> None:
    """This rank's part in hops that follow one another; `done` fires after the last."""

    def go(index: int) -> None:
        if index == len(messages):
            done.fire()
            return
        messages[index].done.then(lambda: go(index + 1))
        streams[index].join(messages[index])

    go(0)
