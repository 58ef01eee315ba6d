"""How blocks fall onto pipeline stages, and what each stage holds and sends.

Blocks are assigned as evenly as they go; what is left over goes to the first stages. The first also has the embedding,
the last the final norm and the head. Stages of the same kind are counted, not repeated.
"""

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
    framework = setting.framework
    parts = candidate.tensor if framework.sequence_parallel or framework.scattered_messages else 1
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    return tokens * setting.spec.hidden * setting.compute_bytes / parts
