"""Which units make a fragment, and after which committed step it is sent and applied: pure, the same everywhere.

A round of a fragment begins every H steps. The F fragments are spread evenly over H, fragment f at steps congruent to
floor((f + 1) H / F) modulo H, so that at most one is sent after a step (Streaming DiLoCo, arXiv 2501.18512, algorithm 2).
What was sent after step t is applied after step t + delay; a delay of up to H keeps several fragments in flight. Steps
count from 1: step t is the t-th optimizer step.

A fragment is a set of whole units of the canonical order, so that every rank of a group owns an equal share of each
fragment and sends it itself. Blocks are assigned (`strided`: block b to fragment b mod F, which Streaming DiLoCo found
slightly better; `sequential`: F runs of consecutive ones); the other units, such as embedding and head, go to whichever
fragment is lightest, largest first.

Bytes of one exchange: n elements of this rank, M groups, c(n) bytes of n compressed elements, a header of 16 bytes
with every message (the weight of the contribution, the hash of what it was taken from). Two groups swap their compressed
changes: (M - 1)(c(n) + 16). More groups reduce in two hops, each with a chunk of ceil(n / M) elements, rounded up to whole
blocks, for every other group: 2 (M - 1)(c(chunk) + 16), as what comes back takes as many bytes as what is sent. Sparse
changes cannot be summed without growing dense, so they are always swapped.

Where k groups add up what they changed before one sum travels farther, each rank sends (k - 1)(16 + 4 ceil(n / k)) bytes
of fp32 inside for its part of the sum, and (k - 1) 4 ceil(n / k) for what comes back; across, M / k places exchange
ceil(n / k) elements as above, with 16 k bytes of headers in a message.

Groups that keep pace tell each other after every step that it is over: M - 1 bytes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from thinwire.errors import PlanError
from thinwire.plan.compression import returned_as, wire_bytes

Order = Literal["strided", "sequential"]
_BLOCK = re.compile(r"^(?:.*\.)?(\d+)$")


def fragment_count(asked: int | str, blocks: int) -> int:
    """F from a number or from "n blocks" (as many fragments as it takes to have n blocks in each). Raises PlanError."""
    if isinstance(asked, int):
        return asked
    found = re.fullmatch(r"(\d+) blocks?(?: each)?", asked.strip())
    if found is None or int(found[1]) == 0:
        raise PlanError(f'sync.fragments = {asked!r} is neither a number nor like "3 blocks"')
    return max(1, -(-blocks // int(found[1])))


def assign_units(units: Sequence[tuple[str, int]], fragments: int, order: Order) -> list[list[int]]:
    """For each fragment the indices of its units, ascending. `units` are (name, elements) in canonical order.

    Raises PlanError if there are more fragments than units.
    """
    if fragments > len(units):
        raise PlanError(f"sync.fragments = {fragments}, but the model has only {len(units)} units; try {len(units)}")
    blocks = [index for index, (name, _) in enumerate(units) if _BLOCK.match(name)]
    rest = sorted((i for i in range(len(units)) if i not in blocks), key=lambda i: (-units[i][1], i))
    out: list[list[int]] = [[] for _ in range(fragments)]
    for position, index in enumerate(blocks):
        chosen = position % fragments if order == "strided" else position * fragments // len(blocks)
        out[chosen].append(index)
    for index in rest:
        empty = [f for f in range(fragments) if not out[f]]
        out[min(empty or range(fragments), key=lambda f: (sum(units[i][1] for i in out[f]), f))].append(index)
    return [sorted(fragment) for fragment in out]


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


HEADER_BYTES, HEARTBEAT_BYTES = 16, 1


def swaps(groups: int, codec: str) -> bool:
    """Whether every group sends its whole change to every other, instead of reducing chunks."""
    return groups <= 2 or codec == "topk"


def chunk_elements(n: int, groups: int, block: int) -> int:
    """Elements of one group's chunk in the two-hop form."""
    return -(-n // (groups * block)) * block


def exchange_bytes(n: int, *, groups: int, codec: str, block: int, element_bytes: int = 4, summed: int = 1) -> int:
    """Bytes that this rank sends compressed for `n` elements of a fragment; `summed` of the groups add theirs up before."""
    places, mine, head_bytes = groups // summed, inside_elements(n, summed), HEADER_BYTES * summed
    if places == 1 or n == 0:
        return 0
    if swaps(places, codec):
        return (places - 1) * (wire_bytes(codec, mine, block=block, element_bytes=element_bytes) + head_bytes)
    chunk = chunk_elements(mine, places, block)
    hops = (codec, returned_as(codec))
    compressed = [wire_bytes(name, chunk, block=block, element_bytes=element_bytes) for name in hops]
    return (places - 1) * sum(compressed_bytes + head_bytes for compressed_bytes in compressed)


def inside_elements(n: int, summed: int) -> int:
    """Elements of which each of the k = `summed` ranks that add up `n` has the sum."""
    return -(-n // summed)


def inside_bytes(n: int, *, summed: int, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes that this rank sends to those it adds up with: (of changes and headers, of what comes back)."""
    chunk_bytes = element_bytes * inside_elements(n, summed)
    return ((summed - 1) * (chunk_bytes + HEADER_BYTES), (summed - 1) * chunk_bytes) if n else (0, 0)
