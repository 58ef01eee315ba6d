"""The moments at which a stage holds most beside its states, and what it holds then.

At the loss: all activations, the loss's own buffers, weights that are whole there. In backward of the head, of the last
block, and of those before it: less and less activations, the block that is computed again and the gradients inside it,
weights of its unit and of the next, the gradient that it makes, and those of units on their way, two at a time
(`partition/reductions.py`). Where gradient sums are cut, the last two of the micro-batch before land only when the
head's has been issued. What error feedback does not send of a step grows as activations go.
"""

from typing import NamedTuple

from thinwire.cost.activations import (
    block_bytes,
    fused_loss,
    fused_loss_bytes,
    gradients_bytes,
    head_bytes,
    whole_block_bytes,
)
from thinwire.cost.candidate import Candidate, Setting
from thinwire.cost.placement import Hop
from thinwire.cost.stages import Kind

_SUMS_BYTES = 4.0


class Held(NamedTuple):
    """Bytes on a rank."""

    gathered: float
    """Whole weights, gradients on their way, and what of them error feedback keeps."""
    activations: float
    live: float
    """What the loss needs; or the gradients inside a block, and the block if it is computed again."""


def fullest(
    setting: Setting,
    candidate: Candidate,
    kind: Kind,
    units: dict[str, float],
    *,
    flying: float,
    cuts: tuple[int, int],
    hops: tuple[Hop, ...],
    lost: float,
) -> Held:
    """The moment that needs most.

    `units`: parameters by unit; `flying`: micro-batches whose activations are kept; `cuts`: into how many parts
    parameters and gradient sums are cut; `lost`: bytes that error feedback keeps of a step by its end.
    """
    cut_p, cut_g = cuts
    kept = block_bytes(setting, candidate) * kind.blocks * flying
    again = whole_block_bytes(setting, candidate) if candidate.recompute in ("per-op", "full") else 0.0
    carried = cut_g > 1 and candidate.accumulate(setting) > 1
    joined = [hop for hop in hops if hop.fanout > 1]
    members = [hop.fanout for hop in joined]
    each, later = (_reduced_bytes(setting, cut_g, joined, carried=carried, first=first) for first in (True, False))
    block, embedding, head = units["block"], units.get("embedding", 0.0), units.get("head", 0.0)
    table = embedding if setting.spec.tied and kind.first and kind.last else 0.0
    # The reduction before the last issued one goes on outwards with what is left of it; on the only links it is let be.
    alone = len(members) < 2
    older = each if alone else later / members[0]
    left = 0.0 if setting.spec.family == "gpt2" else block  # where the table of positions is a unit after the blocks
    before = each * embedding + (older if alone or cut_g > members[0] else 0.0) * left if carried else 0.0
    at_loss, at_head, in_blocks = _whole(candidate, units, kind, table) if cut_p > 1 else (0.0, 0.0, 0.0)
    weights = setting.compute_bytes
    inside = again + gradients_bytes(setting, candidate)
    done = 1.0 / (kind.blocks * flying)
    begun = weights * (in_blocks + table)  # the gradient that the head makes of a tied table waits for the embedding's
    stage = block * kind.blocks + embedding + head
    sent = head + max(0, kind.blocks - 2) * block  # of the first block's backward: the block before is on its way
    return max(
        Held(weights * at_loss + before, kept, _loss(setting, candidate, kind)),
        Held(weights * at_head + before, kept, _head_gradients(setting, candidate, kind, weights * table)),
        Held(begun + weights * block + each * max(head, embedding if carried and alone else 0.0), kept, inside),
        Held(begun + each * block, (1.0 - done) * kept, inside),
        Held(begun + (each + older) * block, max(0.0, 1.0 - 2 * done) * kept, inside),
        Held(begun + (each + older) * block + lost * sent / stage, done * kept, inside),
        Held(each * embedding + lost, 0.0, 0.0),
        key=sum,
    )


def _whole(candidate: Candidate, units: dict[str, float], kind: Kind, table: float) -> tuple[float, float, float]:
    """Parameters that are whole at the loss, in the head's backward and in a block's, while the next unit's come."""
    block, head = units["block"], units.get("head", 0.0)
    stage = block * kind.blocks + units.get("embedding", 0.0) + head
    if candidate.keep_gathered:
        return stage, stage, stage
    return head + table, min(stage, head + table + block), min(stage, 2 * block + table)


def _reduced_bytes(setting: Setting, cut_g: int, hops: list[Hop], *, carried: bool, first: bool) -> float:
    """Bytes that a parameter's gradient takes on its way: as it is sent, as others' parts come in, and their sum.

    Sums that are whole are sent from where they lie; on accelerators others' parts need no room of their own, nor in the
    `first` hop where ranks read each other's memory; the sum of a step's only micro-batch is made where sums lie.
    """
    if not hops or not setting.framework.overlap_reduce:
        return 0.0
    sent = setting.framework.grad_wire_bytes if cut_g > 1 else 0.0
    read = first and hops[0].behind == 0
    came = setting.framework.grad_wire_bytes if setting.cluster.device.kind == "cpu" and not read else 0.0
    return sent + came + (_SUMS_BYTES / hops[0].fanout if carried else 0.0)


def _head_gradients(setting: Setting, candidate: Candidate, kind: Kind, table: float) -> float:
    """What the head's backward has: the gradient of a tied table, or all that a loss makes which is fused with it."""
    if kind.last and fused_loss(setting, candidate):
        return fused_loss_bytes(setting, candidate)[1]
    return table


def _loss(setting: Setting, candidate: Candidate, kind: Kind) -> float:
    """What the loss needs of one micro-batch, and what the head keeps for backward."""
    if not kind.last:
        return 0.0
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    framework = setting.framework
    if fused_loss(setting, candidate):
        return fused_loss_bytes(setting, candidate)[0] + head_bytes(setting, candidate)
    each = framework.cut_logits_bytes if candidate.tensor > 1 else framework.logits_bytes
    return tokens * setting.spec.vocab_size / candidate.tensor * each + head_bytes(setting, candidate)
