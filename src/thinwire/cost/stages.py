"""How blocks fall onto pipeline stages, and how much each stage holds and computes.

Blocks are dealt out as evenly as they go; what is left over goes to the first stages. The first also has the embedding,
the last the final norm and the head. Stages of the same kind are counted, not repeated.
"""

from functools import lru_cache
from typing import NamedTuple

from thinwire.cost.block import Causes, Passes
from thinwire.cost.candidate import Setting


class Kind(NamedTuple):
    """A stage's content."""

    blocks: int
    first: bool
    last: bool


class Counted(NamedTuple):
    """A kind of stage, how many of it there are, and the index of the first of them."""

    kind: Kind
    count: int  # type: ignore[assignment]
    index: int  # type: ignore[assignment]


@lru_cache(maxsize=1024)
def kinds(layers: int, stages: int) -> tuple[Counted, ...]:
    """The stages by kind, in order."""
    more, extra = divmod(layers, stages)
    found: list[Counted] = []
    for index in sorted({0, min(1, stages - 1), min(extra, stages - 1), stages - 1}):
        kind = Kind(more + (index < extra), index == 0, index == stages - 1)
        found.append(Counted(kind, 1, index))
    ends = [item.index for item in found[1:]] + [stages]
    return tuple(Counted(item.kind, end - item.index, item.index) for item, end in zip(found, ends, strict=True))


def parameters_of(setting: Setting, kind: Kind, tensor: int) -> dict[str, float]:
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


def pass_causes(kind: Kind, block: Passes, embedding: Passes, head: Passes) -> Passes:
    """Forward and backward of a whole stage for one micro-batch, communication of the data axis left out."""
    forward, backward = Causes(), Causes()
    forward, backward = forward.plus(block.forward, kind.blocks), backward.plus(block.backward, kind.blocks)
    if kind.first:
        forward, backward = forward.plus(embedding.forward), backward.plus(embedding.backward)
    if kind.last:
        forward, backward = forward.plus(head.forward), backward.plus(head.backward)
    return Passes(forward, backward)
