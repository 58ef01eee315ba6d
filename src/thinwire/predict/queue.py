"""An event queue with streams, first come first served, the same every time; and the order in which a stage computes.

A stream carries one message at a time. A collective waits until all that take part have come to it and it is first in
every one of their streams. Compute goes on beside messages, slower by a factor while any stream of its rank is busy.

A stage computes in the order of 1F1B or its interleaved form, as Megatron-LM runs them (arXiv 2104.04473, 2.2).
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
    started: bool = False


class SendStream:
    """One level's sends of one rank."""

    def __init__(
        self, clock: Clock, rank: int, name: str, worker: "Worker | None", log: Callable[[Span], None]
    ) -> None:
        self._clock, self._log = clock, log
        self.rank, self.name, self.worker = rank, name, worker
        self.queue: deque[Message] = deque()

    def join(self, message: Message) -> None:
        """Come to `message`, last in this stream."""
        self.queue.append(message)
        message.streams.append(self)
        _start(self._clock, message)

    def finish(self, message: Message, start: float) -> None:
        assert self.queue[0] is message
        self.queue.popleft()
        self._log(Span(self.rank, self.name, message.name, start, self._clock.now))
        if self.worker is not None:
            self.worker.beside(-1)


def _start(clock: Clock, message: Message) -> None:
    """Start `message` if everyone is there and it is everyone's turn."""
    ready = len(message.streams) == message.wanted and all(stream.queue[0] is message for stream in message.streams)
    if not ready or message.started:
        return
    message.started = True
    start = clock.now
    for stream in message.streams:
        if stream.worker is not None:
            stream.worker.beside(+1)
    clock.at(start + message.seconds, lambda: _end(clock, message, start))


def _end(clock: Clock, message: Message, start: float) -> None:
    for stream in message.streams:
        stream.finish(message, start)
    message.done.fire()
    for stream in message.streams:
        if stream.queue:
            _start(clock, stream.queue[0])


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


class Pass(NamedTuple):
    """One forward or backward of one chunk for one micro-batch."""

    forward: bool
    micro_batch: int
    chunk: int


def passes(stage: int, stages: int, micro_batches: int, chunks: int) -> list[Pass]:
    """The passes of `stage` in order: forwards to fill the pipeline, one forward one backward, backwards to empty it."""
    total = micro_batches * chunks
    if chunks == 1:
        filling = min(stages - stage - 1, total)
    else:
        filling = total if micro_batches == stages else min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)
    ahead = [_pass(True, k, stages, chunks) for k in range(total)]
    back = [_pass(False, k, stages, chunks) for k in range(total)]
    found = ahead[:filling]
    for k in range(total - filling):
        found += [ahead[filling + k], back[k]]
    return found + back[total - filling :]


def _pass(forward: bool, k: int, stages: int, chunks: int) -> Pass:
    """The k-th forward (backward) of a stage: `stages` micro-batches go through a chunk before the next chunk's turn."""
    if chunks == 1:
        return Pass(forward, k, 0)
    turn, inside = divmod(k, stages * chunks)
    chunk, which = divmod(inside, stages)
    return Pass(forward, turn * stages + which, chunk if forward else chunks - 1 - chunk)


def before(each: Pass, stage: int, stages: int, chunks: int) -> tuple[int, Pass] | None:
    """The (stage, pass) whose output `each` needs from another stage or chunk; none for what begins or turns round."""
    step = -1 if each.forward else 1
    adjacent, chunk = stage + step, each.chunk
    if not 0 <= adjacent < stages:
        chunk, adjacent = chunk + step, adjacent % stages
    if not 0 <= chunk < chunks:
        return None
    return adjacent, Pass(each.forward, each.micro_batch, chunk)
