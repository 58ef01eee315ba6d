"""Seconds of a pipeline's step from those of its stages. 1F1B and its interleaved form (arXiv 2104.04473, section 2.2).

Equal stages without sends take (m + (p - 1) / v) t. With unequal stages the busiest sets the pace and each of the others
adds one passage. A micro-batch needs L = (the sum of all stages) + 2 (p v - 1) sends from its entry to its exit, and only
w = (p v + p - 1) / v of them are under way at once (w = p without interleaving), so that a pace faster than L / w is
not possible: in every window of w micro-batches the first stage waits for the rest. Exact for equal stages and v = 1.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineTime:
    """Seconds of all micro-batches: work of the busiest stage, waiting for others (bubble), and waiting for sends."""

    busiest_s: float
    bubble_s: float
    send_s: float

    @property
    def total(self) -> float:
        return self.busiest_s + self.bubble_s + self.send_s


def pipeline_time(stage_s: list[tuple[float, int]], *, micro_batches: int, chunks: int, send_s: float) -> PipelineTime:
    """`stage_s` lists (seconds of one micro-batch forward and backward, how many such stages there are)."""
    stages = sum(count for _, count in stage_s)
    slowest = max(seconds for seconds, _ in stage_s)
    busiest = micro_batches * slowest
    if stages == 1:
        return PipelineTime(busiest, 0.0, 0.0)
    passage = sum(seconds * count for seconds, count in stage_s)
    bubble = (passage - slowest) / chunks
    sends = 2 * (stages * chunks - 1) * send_s
    under_way = stages + (stages - 1) / chunks if chunks > 1 else float(stages)
    rounds = math.ceil(micro_batches / under_way) - 1
    waiting = rounds * max(0.0, passage + sends - under_way * slowest)
    entry = 2 * (stages - 1) * send_s
    return PipelineTime(busiest, bubble, entry + waiting)


def in_flight(stage: int, stages: int, micro_batches: int, chunks: int) -> float:
    """Micro-batches whose activations stage `stage` (from 0) holds at once; interleaving holds more (section 2.2)."""
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(micro_batches, stages - stage))
    held = (chunks - 1) * stages + 2 * (stages - stage - 1) + 1
    return min(micro_batches * chunks, held) / chunks
