"""Device memory of a stage's ranks by cause, and whether it fits.

States lie as the engine keeps them: weights in the compute precision at lp, gradient sums in fp32 at lg, masters and
the optimizer's states at lo. What a step needs beside them, unsharded weights, gradients on their way, activations and
the loss, is that at its peak, the largest of these.

At the loss: all activations, the loss's own buffers, unsharded weights. In backward of the head, of the last
block, and of those before it: less and less activations, the block that is computed again and the gradients inside it,
weights of its unit and of the next, the gradient that it makes, and those of units on their way, two at a time
(`parallel/shard/reductions.py`). Where gradient sums are sharded, the last two of the micro-batch before land only when the
head's has been issued. What error feedback does not send of a step grows as activations go.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from thinwire.predict.activations import (
    block_bytes,
    full_block_bytes,
    fused_loss,
    fused_loss_bytes,
    gradients_bytes,
    head_bytes,
)
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.pipeline import EqualStages, StageKind, in_flight, kinds, parameters_of
from thinwire.predict.placement import Axes, Hop, hop_depths, shard_counts

MARGIN = 1.05
"""A plan is said to fit only if this many times the predicted memory would still fit."""
SPREAD = 0.08
"""Half of the interval given around a prediction, as a share of it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage, by cause."""

    stage: int
    params: float
    grads: float
    optimizer: float
    residual: float
    """What error feedback has not sent of earlier steps' gradients."""
    gathered: float
    """Unsharded units while they compute, gradients on their way, and what of them error feedback keeps for the next
    step."""
    activations: float
    """What forward has left for backward at that moment, of all micro-batches under way."""
    live: float
    """What the loss needs beside them; or the gradients inside a block, and the block if it is computed again."""
    outer: float
    """Outer weights and momentum on the device: of the fragment that is due; on a CPU, which is its own host, all."""
    framework: float
    host: float
    """Outer weights, momentum and the residual of error feedback, where they are kept; not in the total."""

    @property
    def total(self) -> float:
        return (
            self.params + self.grads + self.optimizer + self.residual + self.gathered + self.activations + self.live
            + self.outer + self.framework
        )  # fmt: skip

    @property
    def interval(self) -> tuple[float, float]:
        return self.total * (1 - SPREAD), self.total * (1 + SPREAD)

    def fits(self, capacity: float) -> bool:
        """Whether a figure larger by 5% would still fit."""
        return self.total * MARGIN <= capacity


def stage_memory(setting: Setting, candidate: Candidate, axes: Axes, equal: EqualStages) -> Memory:
    """Memory of the first stage of this kind (of equal stages the one that holds most)."""
    units = parameters_of(setting, equal.kind, candidate.tensor)
    total = units["block"] * equal.kind.blocks + units.get("embedding", 0.0) + units.get("head", 0.0)
    shards_p, shards_g, shards_o = shard_counts(candidate, axes.states)
    flying = in_flight(equal.first, candidate.pipeline, candidate.accumulate(setting), candidate.chunks)
    shards = (shards_p, shards_g)
    lost = residual_bytes(total, candidate, axes.states)
    held = fullest(setting, candidate, equal.kind, units, flying=flying, shards=shards, hops=axes.states, lost=lost)
    framework = setting.framework
    host, due = outer_bytes(total, setting, candidate)
    return Memory(
        stage=equal.first,
        params=_weights_bytes(setting, candidate, axes.states, total),
        grads=framework.grad_bytes * total / shards_g,
        optimizer=framework.optimizer_bytes * total / shards_o,
        residual=lost,
        gathered=held.gathered,
        activations=held.activations,
        live=held.live,
        outer=host if setting.cluster.device.kind == "cpu" else due,
        framework=float(setting.calibration.framework_bytes),
        host=host,
    )


def _weights_bytes(setting: Setting, candidate: Candidate, hops: tuple[Hop, ...], total: float) -> float:
    """Weights in the compute precision, but for the fp32 masters that lie in them: no codec came between (`Flat`)."""
    shards_p, _, shards_o = shard_counts(candidate, hops)
    if setting.framework.casts_on_gather and shards_p == shards_o:
        return 0.0
    lp, _, lo = hop_depths(candidate, hops)
    refreshed = [hop.level for hop in hops[lp + 1 : lo + 1] if hop.fanout > 1]
    compressed = candidate.weights and any(candidate.weights[level] not in (None, "fp32") for level in refreshed)
    inside = 4.0 * total / shards_o if setting.compute_dtype == "fp32" and not compressed else 0.0
    return setting.compute_bytes * total / shards_p - inside


def residual_bytes(parameters: float, candidate: Candidate, hops: tuple[Hop, ...]) -> float:
    """fp32, of the sums that enter the outermost hop whose codec loses something (`comm/lowrank.py`)."""
    lg, carries = hop_depths(candidate, hops)[1], candidate.coding.error_feedback and candidate.grads
    compressed = [
        i for i, hop in enumerate(hops) if carries and i > lg and hop.fanout > 1 and candidate.grads[hop.level]
    ]
    if not compressed:
        return 0.0
    return 4.0 * parameters / prod(hop.fanout for hop in hops[: compressed[-1]])


def outer_bytes(parameters: float, setting: Setting, candidate: Candidate) -> tuple[float, float]:
    """(in host memory, of the fragment that is due) of a rank whose stage and tensor part has so many parameters.

    fp32 weights and momentum, and the residual with error feedback, sharded over all ranks of the group that hold the same
    parameters, whatever the partition.
    """
    sync = candidate.sync
    if sync is None:
        return 0.0, 0.0
    own = parameters / max(1, candidate.data(setting.cluster) * candidate.context)
    return (12.0 if sync.error_feedback else 8.0) * own, 8.0 * own / sync.fragments


def peak_memory(setting: Setting, candidate: Candidate, axes: Axes) -> Memory:
    """Memory of the fullest stage."""
    stages = kinds(setting.spec.layers, candidate.pipeline)
    return max((stage_memory(setting, candidate, axes, each) for each in stages), key=lambda memory: memory.total)


_SUMS_BYTES = 4.0


class PeakBytes(NamedTuple):
    """Bytes on a rank."""

    gathered: float
    """Unsharded weights, gradients on their way, and what of them error feedback keeps."""
    activations: float
    live: float
    """What the loss needs; or the gradients inside a block, and the block if it is computed again."""


def fullest(
    setting: Setting,
    candidate: Candidate,
    kind: StageKind,
    units: dict[str, float],
    *,
    flying: float,
    shards: tuple[int, int],
    hops: tuple[Hop, ...],
    lost: float,
) -> PeakBytes:
    """The largest of the peaks of a step.

    `units`: parameters by unit; `flying`: micro-batches whose activations are kept; `shards`: how many
    parameters and gradient sums have; `lost`: bytes that error feedback keeps of a step by its end.
    """
    shards_p, shards_g = shards
    kept = block_bytes(setting, candidate) * kind.blocks * flying
    again = full_block_bytes(setting, candidate) if candidate.recompute in ("per-op", "full") else 0.0
    carried = shards_g > 1 and candidate.accumulate(setting) > 1
    joined = [hop for hop in hops if hop.fanout > 1]
    members = [hop.fanout for hop in joined]
    each, later = (_reduced_bytes(setting, shards_g, joined, carried=carried, first=first) for first in (True, False))
    block, embedding, head = units["block"], units.get("embedding", 0.0), units.get("head", 0.0)
    table = embedding if setting.spec.tied and kind.first and kind.last else 0.0
    # The reduction before the last issued one goes on outwards with what is left of it; on the only links it waits.
    alone = len(members) < 2
    older = each if alone else later / members[0]
    left = 0.0 if setting.spec.family == "gpt2" else block  # where the table of positions is a unit after the blocks
    before = each * embedding + (older if alone or shards_g > members[0] else 0.0) * left if carried else 0.0
    at_loss, at_head, in_blocks = _unsharded(candidate, units, kind, table) if shards_p > 1 else (0.0, 0.0, 0.0)
    weights = setting.compute_bytes
    inside = again + gradients_bytes(setting, candidate)
    done = 1.0 / (kind.blocks * flying)
    begun = weights * (in_blocks + table)  # the gradient that the head makes of a tied table waits for the embedding's
    stage = block * kind.blocks + embedding + head
    sent = head + max(0, kind.blocks - 2) * block  # of the first block's backward: the block before is on its way
    return max(
        PeakBytes(weights * at_loss + before, kept, _loss(setting, candidate, kind)),
        PeakBytes(weights * at_head + before, kept, _head_gradients(setting, candidate, kind, weights * table)),
        PeakBytes(begun + weights * block + each * max(head, embedding if carried and alone else 0.0), kept, inside),
        PeakBytes(begun + each * block, (1.0 - done) * kept, inside),
        PeakBytes(begun + (each + older) * block, max(0.0, 1.0 - 2 * done) * kept, inside),
        PeakBytes(begun + (each + older) * block + lost * sent / stage, done * kept, inside),
        PeakBytes(each * embedding + lost, 0.0, 0.0),
        key=sum,
    )


def _unsharded(
    candidate: Candidate, units: dict[str, float], kind: StageKind, table: float
) -> tuple[float, float, float]:
    """Unsharded parameters at the loss, in the head's backward and in a block's, while the next unit's come."""
    block, head = units["block"], units.get("head", 0.0)
    stage = block * kind.blocks + units.get("embedding", 0.0) + head
    if candidate.keep_gathered:
        return stage, stage, stage
    return head + table, min(stage, head + table + block), min(stage, 2 * block + table)


def _reduced_bytes(setting: Setting, shards_g: int, hops: list[Hop], *, carried: bool, first: bool) -> float:
    """Bytes that a parameter's gradient takes on its way: as it is sent, as others' parts come in, and their sum.

    Unsharded sums are sent from where they lie; on accelerators others' parts need no room of their own, nor in the
    `first` hop where ranks read each other's memory; the sum of a step's only micro-batch is made where sums lie.
    """
    if not hops or not setting.framework.overlap_reduce:
        return 0.0
    sent = setting.framework.grad_wire_bytes if shards_g > 1 else 0.0
    read = first and hops[0].behind == 0
    came = setting.framework.grad_wire_bytes if setting.cluster.device.kind == "cpu" and not read else 0.0
    return sent + came + (_SUMS_BYTES / hops[0].fanout if carried else 0.0)


def _head_gradients(setting: Setting, candidate: Candidate, kind: StageKind, table: float) -> float:
    """What the head's backward has: the gradient of a tied table, or all that a loss makes which is fused with it."""
    if kind.last and fused_loss(setting, candidate):
        return fused_loss_bytes(setting, candidate)[1]
    return table


def _loss(setting: Setting, candidate: Candidate, kind: StageKind) -> float:
    """What the loss needs of one micro-batch, and what the head keeps for backward."""
    if not kind.last:
        return 0.0
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    framework = setting.framework
    if fused_loss(setting, candidate):
        return fused_loss_bytes(setting, candidate)[0] + head_bytes(setting, candidate)
    each = framework.split_logits_bytes if candidate.tensor > 1 else framework.logits_bytes
    return tokens * setting.spec.vocab_size / candidate.tensor * each + head_bytes(setting, candidate)
