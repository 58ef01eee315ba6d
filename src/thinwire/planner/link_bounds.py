"""What partitions and codecs take at least on the links, from what the first stage sends, before one is costed alone.

The first stage has no fewer blocks than any other, begins first and ends last. What its units move under each partition
is the same for many cores, and is kept as arrays.
"""

from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from thinwire.plan.compression import wire_bytes
from thinwire.planner.space import COMPRESSION, Space, partitions, with_codecs
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.course import StagePasses
from thinwire.predict.overlap import UnitMoves, shares
from thinwire.predict.pipeline import parameters_of
from thinwire.predict.placement import Axes, blocks_together, codec_at
from thinwire.predict.sent import unit_moves
from thinwire.predict.step import Core

PROBE = 2**20
"""Elements of a message, whole blocks of them, that tells what one takes."""
Seconds = NDArray[np.float64]


class LinkBounds:
    """Of one setting and space; what many cores share is counted once."""

    def __init__(self, setting: Setting, space: Space) -> None:
        self._setting, self._space = setting, space
        self._least: dict[tuple[object, ...], float] = {}
        self._choices: dict[tuple[object, ...], Choices] = {}

    def least_s(self, candidate: Candidate, axes: Axes, core: Core) -> float:
        """Whatever the partition: one reduction and one gather of the first stage at every level, in the fewest bytes."""
        key = (candidate.tensor, candidate.pipeline, axes.states)
        if key not in self._least:
            kind = core.stages[0].kind
            held = parameters_of(self._setting, kind, candidate.tensor)
            elements = held["block"] * kind.blocks + held["embedding"]
            self._least[key] = 0.0
            for hop in axes.states:
                elements /= hop.fanout
                sent = elements * (hop.fanout - 1) * self._element_bytes(candidate, axes, hop.level)
                self._least[key] = max(self._least[key], hop.behind * sent / hop.bytes_per_s)
        return self._least[key]

    def _element_bytes(self, candidate: Candidate, axes: Axes, level: int) -> float:
        """Least bytes of an element reduced and gathered at `level`."""
        plain_weight, plain_grad = self._setting.compute_bytes, round(self._setting.framework.grad_wire_bytes)
        found, none = [], (None,) * len(self._setting.cluster.levels)
        for each in with_codecs(self._setting, self._space, replace(candidate, depths=(-1, -1, level)), axes):
            gathered, reduced = (
                wire_bytes(codec_at(codecs, level) or "fp32", PROBE, block=each.coding.block, element_bytes=plain)
                / PROBE
                for codecs, plain in ((each.weights or none, plain_weight), (each.grads or none, plain_grad))
            )
            found.append(reduced + min(gathered, reduced))
        return min(found, default=0.0)

    def choices(self, candidate: Candidate, axes: Axes, core: Core) -> "Choices":
        """Partitions and codecs, with what they move of the first stage: the same for many cores."""
        held = parameters_of(self._setting, core.stages[0].kind, candidate.tensor)
        key = (candidate.tensor, axes.states, candidate.pipeline == 1)
        if key not in self._choices:
            every = [
                each
                for each in partitions(self._setting, self._space, candidate, axes)
                if self._space.allows(each, partition=True)
            ]
            moves: dict[tuple[object, ...], tuple[UnitMoves, UnitMoves]] = {}
            for each in every:
                hops = (each.depths, each.weights, each.grads)
                if hops not in moves:  # whether weights are kept changes nothing of how they travel
                    together = blocks_together(self._setting, each, axes.states)
                    block, embedding = (
                        unit_moves(many * held[unit], self._setting, each, axes.states)
                        for unit, many in (("block", together), ("embedding", 1))
                    )
                    moves[hops] = block, embedding
            found = [moves[each.depths, each.weights, each.grads] for each in every]
            together = blocks_together(self._setting, candidate, axes.states)
            self._choices[key] = Choices(every, found, len(self._setting.cluster.levels), together)
        return self._choices[key]


class Choices:
    """Partitions with their codecs, and seconds by level [choice, level] of what `together` blocks and the table move."""

    def __init__(
        self, every: list[Candidate], moves: list[tuple[UnitMoves, UnitMoves]], levels: int, together: int
    ) -> None:
        block, embedding = ([pair[unit] for pair in moves] for unit in (0, 1))
        self._together = together
        names = ("depths", "keep_gathered", *COMPRESSION)
        self.fields = [{name: getattr(each, name) for name in names} for each in every]
        self._kept = np.array([[each.keep_gathered] for each in every])
        seconds = partial(_seconds, levels=levels)
        self._gather, self._reduce_each = seconds(block, "gather"), seconds(block, "reduce_each")
        self._reduce_last, self._refresh = seconds(block, "reduce_last"), seconds(block, "refresh")
        self._table_last, self._table_refresh = seconds(embedding, "reduce_last"), seconds(embedding, "refresh")

    def bounds(self, core: Core, first: StagePasses, last_s: tuple[float, ...]) -> Seconds:
        """Lower bounds from what the first stage sends: it is the last to end and the first to begin.

        No stream is done sooner than its bytes take. The first forward is not over before new weights are there, and
        reductions of each chunk's last micro-batch set out after its backward has begun, at `last_s` if nothing is moved.
        """
        times, blocks = core.micro_batches, core.stages[0].kind.blocks // self._together  # those left over send too
        upto = [*accumulate(shares(blocks, len(last_s)))]
        gathers = np.where(self._kept, 1, 2 * times) * self._gather
        busy = blocks * (gathers + (times - 1) * self._reduce_each + self._reduce_last + self._refresh)
        landed = np.full(len(busy), last_s[0] + first.backward[0])
        for start, sent in zip(last_s, upto, strict=True):
            landed = np.maximum(landed, start + (sent * self._reduce_last + self._table_last).max(axis=1))
        refreshed = (upto[0] * self._refresh + self._table_refresh).max(axis=1)
        found: Seconds = np.maximum(busy.max(axis=1), landed + np.maximum(0.0, refreshed - first.forward[0]))
        return found


def _seconds(moves: list[UnitMoves], name: str, *, levels: int) -> Seconds:
    found = np.zeros((len(moves), levels))
    for row, each in enumerate(moves):
        for level, seconds in getattr(each, name):
            found[row, level] += seconds
    return found
