"""How blocks fall onto pipeline stages, what each stage holds and sends, and the seconds of 1F1B from those of its stages.

Blocks are assigned as evenly as they go; what is left over goes to the first stages. The first also has the embedding,
the last the final norm and the head. Stages of the same kind are counted, not repeated.

1F1B and its interleaved form are those of arXiv 2104.04473, section 2.2. Equal stages without sends take
(m + (p - 1) / v) t. With unequal stages the busiest sets the pace and each of the others adds one passage. A micro-batch
needs L = (the sum of all stages) + 2 (p v - 1) sends from its entry to its exit, and only w = (p v + p - 1) / v of them are
under way at once (w = p without interleaving), so that a pace faster than L / w is not possible: in every window of w
micro-batches the first stage waits for the rest. Exact for equal stages and v = 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from thinwire.predict.candidate import Candidate, Setting


class StageKind(NamedTuple):
    """A stage's content."""

    blocks: int
    first: bool
    last: bool


class EqualStages(NamedTuple):
    """A kind of stage, how many of it there are, and the index of the first of them."""

    kind: StageKind
    many: int
    first: int


@lru_cache(maxsize=1024)
def kinds(layers: int, stages: int) -> tuple[EqualStages, ...]:
    """The stages by kind, in order."""
    more, extra = divmod(layers, stages)
    found: list[EqualStages] = []
    for index in sorted({0, min(1, stages - 1), min(extra, stages - 1), stages - 1}):
        kind = StageKind(more + (index < extra), index == 0, index == stages - 1)
        found.append(EqualStages(kind, 1, index))
    ends = [item.first for item in found[1:]] + [stages]
    return tuple(EqualStages(item.kind, end - item.first, item.first) for item, end in zip(found, ends, strict=True))


def parameters_of(setting: Setting, kind: StageKind, tensor: int) -> dict[str, float]:
    """Unit -> parameters on one of `tensor` ranks of a stage of this kind; `block` is that of one block."""
    spec = setting.spec
    table = spec.vocab_size * spec.hidden
    positions = spec.max_tokens * spec.hidden if spec.family == "gpt2" else 0
    found = {"block": setting.block_parameters / tensor}
    if kind.first:
        found["embedding"] = (table + positions) / tensor
    if kind.last and not (spec.tied and kind.first):
        found["head"] = (table + spec.hidden) / tensor
    elif kind.last and setting.framework.tied_units:
        found["head"] = spec.hidden / tensor
    return found


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


def message_bytes(setting: Setting, candidate: Candidate) -> float:
    """What a rank sends to the next stage for one micro-batch; with sequence parallelism it has only its part of it."""
    parts = candidate.tensor if setting.framework.sequence_parallel else 1
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    return tokens * setting.spec.hidden * setting.compute_bytes / parts
