"""When the passes of a pipeline begin, without an event queue: 1F1B and its interleaved form as a max-plus recurrence.

A pass begins once its stage is done with the pass before it and its input has arrived. Its output is sent at its end, over
the stage's own pipeline stream, which carries one message at a time in the order of the passes. A pass that takes longer or
arrives later moves others only to later times, so lower bounds of the passes give lower bounds of all that follows.

Many micro-batches repeat: once all that the future depends on (when stages and their streams are free, what is on its way)
has moved by one and the same time since the same place in the schedule, it will do so again, and the rest is skipped
(a max-plus linear system becomes periodic: Baccelli et al. 1992, Synchronization and Linearity, theorem 3.28).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ALIKE = 1e-11
"""Relative difference up to which two times are the same."""


@dataclass(frozen=True)
class StagePasses:
    """Seconds of a stage's passes by chunk, and when the first forward of each can end at the earliest."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    floor: tuple[float, ...]

    @property
    def work_s(self) -> float:
        """One micro-batch through all chunks."""
        return sum(self.forward) + sum(self.backward)


@dataclass(frozen=True)
class Course:
    """Of each stage: when its first pass begins, and by chunk the backward of the last micro-batch."""

    first_s: tuple[float, ...]
    last_s: tuple[tuple[float, ...], ...]


def end_s(stages: Sequence[StagePasses], *, micro_batches: int, send_s: float) -> float:
    """Seconds of the passes of all stages: the last one of the first stage comes after all others."""
    return course(stages, micro_batches=micro_batches, send_s=send_s).last_s[0][0] + stages[0].backward[0]


def course(stages: Sequence[StagePasses], *, micro_batches: int, send_s: float) -> Course:
    """Follow all passes of all stages. O(stages x chunks x micro-batches until they repeat)."""
    if len(stages) == len(stages[0].forward) == 1:
        ahead, back, only = stages[0].forward[0], stages[0].backward[0], stages[0]
        return Course((0.0,), ((max(ahead, only.floor[0]) + (micro_batches - 1) * (ahead + back),),))
    return _Course(stages, micro_batches, send_s).run()


class _Course:
    """The state of the recurrence: what each stage has done, and what is on its way to it.

    The k-th forward of all stages is of one micro-batch and chunk, and so is the k-th backward (`queue.passes`): inputs
    arrive in the order in which they are needed.
    """

    def __init__(self, stages: Sequence[StagePasses], micro_batches: int, send_s: float) -> None:
        self.stages, self.send_s, self.many, self.chunks = stages, send_s, len(stages), len(stages[0].forward)
        self.turn = self.many * self.chunks
        """Forwards of a stage after which its chunks come in the same order again."""
        self.total = micro_batches * self.chunks
        self.ahead, self.back = [0] * self.many, [0] * self.many
        """Forwards and backwards done."""
        self.free, self.pipe = [0.0] * self.many, [0.0] * self.many
        self.coming: tuple[list[deque[float]], list[deque[float]]] = (
            [deque() for _ in stages],
            [deque() for _ in stages],
        )
        """Arrivals of inputs, of forwards and of backwards."""
        self.filling = [self._filling(stage, micro_batches) for stage in range(self.many)]
        self.first_s, self.last_s = [0.0] * self.many, [[0.0] * self.chunks for _ in stages]

    def _filling(self, stage: int, micro_batches: int) -> int:
        later = self.many - stage - 1
        if self.chunks == 1:
            return min(later, self.total)
        every = micro_batches == self.many
        return self.total if every else min(2 * later + (self.chunks - 1) * self.many, self.total)

    def run(self) -> Course:
        seen: dict[tuple[int, ...], tuple[int, list[float]]] = {}
        order = [*range(self.many), *reversed(range(self.many - 1))]
        while self.back[0] < self.total:
            for stage in order:
                self._advance(stage)
            if max(self.ahead) < self.total and min(self.ahead) >= self.turn:
                self._skip(seen)
        return Course(tuple(self.first_s), tuple(map(tuple, self.last_s)))

    def _advance(self, stage: int) -> None:
        """Run the passes of `stage` whose inputs are there."""
        passes, last, chunks, total = self.stages[stage], self.many - 1, self.chunks, self.total
        ahead, back, filling = self.ahead[stage], self.back[stage], self.filling[stage]
        free, pipe, send_s = self.free[stage], self.pipe[stage], self.send_s
        forwards, backwards = self.coming[0][stage], self.coming[1][stage]
        to_next, to_previous = self.coming[0][(stage + 1) % self.many], self.coming[1][stage - 1]
        while back < total:
            forward = ahead < total and ahead - back <= filling
            chunk = (ahead if forward else back) // self.many % chunks if chunks > 1 else 0
            chunk = chunk if forward else chunks - 1 - chunk
            begin = free
            if forward:
                if stage > 0 or chunk > 0:
                    if not forwards:
                        break
                    begin = max(begin, forwards.popleft())
                free = begin + passes.forward[chunk]
                if ahead < self.turn and ahead % self.many == 0 and (chunks > 1 or ahead == 0):
                    free = max(free, passes.floor[chunk])
                if ahead == 0:
                    self.first_s[stage] = begin
                ahead += 1
                sends, target = stage < last or chunk < chunks - 1, to_next
            else:
                if stage < last or chunk < chunks - 1:
                    if not backwards:
                        break
                    begin = max(begin, backwards.popleft())
                free = begin + passes.backward[chunk]
                self.last_s[stage][chunk] = begin
                back += 1
                sends, target = stage > 0 or chunk > 0, to_previous
            if sends:
                pipe = max(free, pipe) + send_s
                target.append(pipe)
        self.ahead[stage], self.back[stage], self.free[stage], self.pipe[stage] = ahead, back, free, pipe

    def _skip(self, seen: dict[tuple[int, ...], tuple[int, list[float]]]) -> None:
        """Leave out whole periods if one is over."""
        queues = [*self.coming[0], *self.coming[1]]
        place = (self.ahead[0] % self.turn, *(done - self.ahead[0] for done in (*self.ahead, *self.back)))
        place += tuple(len(queue) for queue in queues)
        times = [*self.free, *self.pipe, *(time for queue in queues for time in queue)]
        done, before = seen.get(place, (0, []))
        seen[place] = self.ahead[0], times
        if not before:
            return
        moved = times[0] - before[0]
        if any(abs(now - then - moved) > ALIKE * times[0] for now, then in zip(times, before, strict=True)):
            return
        period = self.ahead[0] - done
        skipped = (self.total - 1 - max(self.ahead)) // period
        self.ahead = [count + skipped * period for count in self.ahead]
        self.back = [count + skipped * period for count in self.back]
        self.free = [time + skipped * moved for time in self.free]
        self.pipe = [time + skipped * moved for time in self.pipe]
        for queue in queues:
            queue.extend([queue.popleft() + skipped * moved for _ in range(len(queue))])
        seen.clear()
