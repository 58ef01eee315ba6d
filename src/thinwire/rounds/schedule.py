"""Which fragment is sent and applied after which committed step: a pure function of the step, the same everywhere.

A round of a fragment begins every H steps. The F fragments are spread evenly over H, fragment f at steps congruent to
floor((f + 1) H / F) modulo H, so that at most one is sent after a step (Streaming DiLoCo, arXiv 2501.18512, algorithm 2).
What was sent after step t is applied after step t + delay; a delay of up to H keeps several fragments in flight. Steps
count from 1: step t is the t-th optimizer step.
"""

from collections.abc import Iterator
from dataclasses import dataclass


def hops_due(delay: int, *, far: int, sums: bool) -> list[int]:
    """Steps after sending when the second hop of an exchange sets out, the third and so on; all are over after `delay`.

    `far` hops over the slow links share the time evenly. With `sums` there is one before them and one after them, inside a
    fast level, each with a quarter of the delay, but a step at least: ranks of one place need not be equally far.
    """
    halves = [(delay + 1) // 2] * (far - 1)
    edge = max(1, delay // 4)
    return [edge, *halves, delay - edge] if sums else halves


@dataclass(frozen=True)
class Exchange:
    """One fragment of one round: sent after step `send`, applied after step `apply`."""

    round: int
    """Counts the rounds of this fragment from 0."""
    fragment: int
    send: int
    apply: int


@dataclass(frozen=True)
class Schedule:
    """H `inner_steps`, F `fragments` with F <= H, `delay` <= H steps."""

    inner_steps: int
    fragments: int
    delay: int

    def offset(self, fragment: int) -> int:
        """The steps after which `fragment` is sent are those congruent to this modulo H."""
        return (fragment + 1) * self.inner_steps // self.fragments % self.inner_steps

    def sent_after(self, step: int) -> Exchange | None:
        """What is sent after `step`."""
        for fragment in range(self.fragments):
            first = self.offset(fragment) or self.inner_steps
            if step >= first and (step - first) % self.inner_steps == 0:
                return Exchange((step - first) // self.inner_steps, fragment, step, step + self.delay)
        return None

    def applied_after(self, step: int) -> Exchange | None:
        """What is applied after `step`."""
        return self.sent_after(step - self.delay) if step > self.delay else None

    def in_flight(self, step: int) -> list[Exchange]:
        """What was sent and is not applied once step `step` is over, oldest first."""
        sent = (self.sent_after(earlier) for earlier in range(max(1, step - self.delay + 1), step + 1))
        return [exchange for exchange in sent if exchange is not None and exchange.apply > step]

    def table(self, steps: int) -> Iterator[Exchange]:
        """Every exchange sent in the first `steps` steps, in order."""
        for step in range(1, steps + 1):
            exchange = self.sent_after(step)
            if exchange is not None:
                yield exchange
