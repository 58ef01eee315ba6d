"""What is planned for, and a point of the planner's space.

`Setting` is what is given, the runtime (`Framework`) included. A `Candidate` is the data-parallel core that a `Plan` can
say, and the axes that it cannot say yet. Axes lie on ranks from inner to outer: tensor, context, then data and pipeline
(in either order), then the groups that synchronise rarely. `data` is what is left of the ranks. Depths of the partition
are indices of cluster levels.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from thinwire.cluster.cluster import Calibration, Cluster
from thinwire.model.spec import ModelSpec
from thinwire.plan.compression import CodecName, Compression, OuterCodecName, Rounding
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.plan.partition import Partition
from thinwire.plan.plan import ComputeDtype, Plan
from thinwire.plan.rounds import fragment_count
from thinwire.plan.sync import Sync, SyncConfig

Recompute = Literal["none", "selective", "per-op", "full"]
"""Selective: attention's scores. Per-op, torchtitan's: all but attention's output and every second matmul's."""
COMPUTE_BYTES: dict[str, int] = {"fp64": 8, "fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Framework:
    """What a runtime does, as far as costs depend on it. Bytes are per parameter."""

    name: str
    grad_bytes: float = 4.0
    """Gradient sums in memory."""
    grad_wire_bytes: float = 4.0
    """Gradients on the wire where no codec is named."""
    optimizer_bytes: float = 12.0
    """Master weights and the optimizer's states, of AdamW two moments."""
    flash_attention: bool = True
    """Attention scores are never stored, and a causal kernel does half of the square."""
    dropout: bool = False
    """Masks of a block's two dropouts are kept."""
    sequence_parallel: bool = True
    """Outside its matmuls a tensor-parallel block is split along the sequence (arXiv 2205.05198)."""
    scattered_messages: bool = False
    """Without sequence parallelism: each tensor-parallel rank sends its part of a message between stages, and the receivers
    gather it again (arXiv 2104.04473, section 4.1)."""
    overlap_reduce: bool = True
    """Gradients are reduced behind backward."""
    overlap_refresh: bool = True
    """New weights are gathered behind the next forward."""
    broadcast_refresh: bool = False
    """New weights come by one broadcast from each owner, not by one gather."""
    prefetch: bool = True
    """The next unit's weights are gathered behind this unit's compute."""
    fused_elementwise: bool = False
    """Chains of element-wise operations run as one kernel (torch.compile)."""
    full_table_grad: bool = False
    """Each micro-batch makes the embedding's gradient as a full table, not only the rows of its tokens."""
    tied_units: bool = False
    """A tied table stays unsharded from forward to backward, and the final norm is then a unit of its own."""
    logits_bytes: float = 12.0
    """Per logit at the peak: fp32 log-softmax, the gradient that comes and the one that is made of it."""
    fused_loss: bool = False
    """Head and loss are one function over chunks of tokens, which makes the gradients in forward (`model/loss.py`)."""
    split_logits_bytes: float = 12.0
    """The same where tensor-parallel ranks each hold a part of the vocabulary."""
    casts_on_gather: bool = False
    """Weights in the compute precision exist only where they are gathered; sharded ones are the fp32 masters."""
    packed_qkv: bool = False
    """Queries, keys and values are made in one buffer, which the values keep alive in full."""
    keeps_gathered_inputs: bool = False
    """Inputs that sequence parallelism gathers for a matmul are kept in full for backward, not gathered again."""
    buckets: bool = False
    """Small units travel together, as the links ask for (`plan/hops.py`)."""


THINWIRE = Framework("thinwire", full_table_grad=True, tied_units=True, packed_qkv=True, fused_loss=True, buckets=True)
"""With AdamW."""


def thinwire_with(optimizer: OptimizerConfig) -> Framework:
    """thinwire with the states of another optimizer, in fp32; its seconds are still those of AdamW, which takes longest."""
    return replace(THINWIRE, optimizer_bytes=4.0 * (1 + optimizer.state_numbers))


@dataclass(frozen=True, eq=False)
class Setting:
    """What is given: the model, the cluster, the batch, and the runtime with its calibration."""

    spec: ModelSpec
    cluster: Cluster
    sequences: int
    """Sequences in one optimizer step, over all ranks."""
    tokens: int
    """Tokens in one sequence."""
    framework: Framework = THINWIRE
    calibration: Calibration = field(default_factory=Calibration)
    compute_dtype: ComputeDtype = "bf16"

    @property
    def compute_bytes(self) -> int:
        return COMPUTE_BYTES[self.compute_dtype]

    @cached_property
    def block_parameters(self) -> int:
        return self.spec.parameters_per_block

    @cached_property
    def parameters(self) -> int:
        return self.spec.parameters


@dataclass(frozen=True)
class CandidateSync:
    """Groups that synchronise once in `inner_steps` (DiLoCo, arXiv 2311.08105; Streaming DiLoCo, 2501.18512).

    The groups are the members of level `level` and of all levels outside it.
    """

    level: int
    inner_steps: int
    fragments: int = 1
    overlap_steps: int = 0
    """Steps during which a fragment may travel behind compute."""
    codec: OuterCodecName = "bf16"
    error_feedback: bool = False
    said: Sync | None = None
    """All of it, where a run file or a plan decides it."""

    @staticmethod
    def of(rounds: Sync, level: int, blocks: int) -> "CandidateSync":
        """What costs depend on, of `rounds` across `level` for a model of so many blocks."""
        fragments = fragment_count(rounds.fragments, blocks)
        return CandidateSync(
            level, rounds.inner_steps, fragments, rounds.delay, rounds.codec, rounds.error_feedback, said=rounds
        )

    def rounds(self, levels: tuple[tuple[str, int], ...]) -> Sync:
        """What the trainer gets, on these levels."""
        if self.said is not None:
            return self.said
        config = SyncConfig(
            kind="streaming_diloco" if self.overlap_steps else "diloco",
            level=levels[self.level][0],
            inner_steps=self.inner_steps,
            fragments=self.fragments,
            delay=self.overlap_steps,
            codec=self.codec,
            error_feedback=self.error_feedback,
        )
        return config.resolve(levels)

    def groups(self, cluster: Cluster) -> int:
        """How many groups there are: ranks of the cluster over ranks inside one member of `level`."""
        return cluster.ranks // cluster.ranks_within(self.level - 1)

    @property
    def summed(self) -> int:
        """Groups that add up what they changed before it travels farther; 1: none do."""
        return 1 if self.said is None else self.said.summed

    def senders(self, cluster: Cluster) -> int:
        """Groups, or places in which they add up, that send each other what they changed."""
        return self.groups(cluster) // self.summed

    def peers(self, cluster: Cluster) -> list[int]:
        """At `level` and each level outside it, how many other senders first part from one there."""
        return self._parting(cluster, self.summed)

    def group_peers(self, cluster: Cluster) -> list[int]:
        """`peers`, of groups instead of senders."""
        return self._parting(cluster, 1)

    def _parting(self, cluster: Cluster, together: int) -> list[int]:
        inside = cluster.ranks_within(self.level - 1) * together
        reached = [1, *(max(1, cluster.ranks_within(i) // inside) for i in range(self.level, len(cluster.levels)))]
        return [more - fewer for fewer, more in pairwise(reached)]


class CodecOptions(NamedTuple):
    """What else a plan decides of codecs that have a scale for each block of numbers."""

    block: Literal[64, 128, 256] = 128
    rounding: Rounding = "nearest"
    error_feedback: bool = False


_PLAIN = CodecOptions()


@dataclass(frozen=True)
class Candidate:
    """Every decision. Depths (lp, lg, lo): -1 is a replica, else the index of the level up to which a state is sharded."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Virtual stages on each rank (interleaved 1F1B, arXiv 2104.04473)."""
    pipeline_outside: bool = True
    """Pipeline stages lie outside the data axis (Megatron's order); else inside it."""
    micro_batch: int = 1
    recompute: Recompute = "none"
    recompute_every: int = 1
    """Full recompute is applied to every such block."""
    depths: tuple[int, int, int] = (-1, -1, -1)
    keep_gathered: bool = False
    weights: tuple[CodecName | None, ...] = ()
    """Codec of weights at each level, none: as they are."""
    grads: tuple[CodecName | None, ...] = ()
    coding: CodecOptions = _PLAIN
    bucket_bytes: int | None = None
    """Up to this size units travel together; none: what suits the links."""
    sync: CandidateSync | None = None

    @staticmethod
    def of_plan(plan: Plan, blocks: int) -> "Candidate":
        """The point that a plan is for a model of so many blocks."""
        weights, grads = plan.compression.weights, plan.compression.grads
        return Candidate(
            micro_batch=plan.micro_batch,
            recompute=plan.recompute,
            depths=plan.depths,
            keep_gathered=plan.partition.keep_gathered,
            weights=tuple(weights.get(name) for name in plan.level_names) if weights else (),
            grads=tuple(grads.get(name) for name in plan.level_names) if grads else (),
            bucket_bytes=plan.bucket_bytes,
            coding=CodecOptions(plan.compression.block, plan.compression.rounding, plan.compression.error_feedback),
            sync=None if plan.sync is None else CandidateSync.of(plan.sync, plan.levels_in_group, blocks),
        )

    def groups(self, cluster: Cluster) -> int:
        return self.sync.groups(cluster) if self.sync else 1

    def data(self, cluster: Cluster) -> int:
        """Ranks along the data axis inside one group; 0 if the axes do not divide the ranks."""
        others = self.tensor * self.context * self.pipeline * self.groups(cluster)
        return 0 if cluster.ranks % others else cluster.ranks // others

    def accumulate(self, setting: Setting) -> int:
        """Micro-batches of a rank in one step; 0 if the batch does not divide."""
        share = self.data(setting.cluster) * self.groups(setting.cluster) * self.micro_batch
        return 0 if share == 0 or setting.sequences % share else setting.sequences // share

    @property
    def not_run_yet(self) -> tuple[str, ...]:
        """What of it the trainer does not run."""
        found = [name for name in ("tensor", "context", "pipeline") if getattr(self, name) > 1]
        found += [f"{self.recompute} recompute"] if self.recompute in ("selective", "per-op") else []
        return tuple(found)

    @property
    def runnable(self) -> bool:
        """Whether `thinwire train` runs it as it stands."""
        return not self.not_run_yet and self.recompute_every == 1

    def partition(self, cluster: Cluster) -> Partition:
        names = ["replica" if depth < 0 else cluster.level_names[depth] for depth in self.depths]
        return Partition(params=names[0], grads=names[1], optimizer=names[2], keep_gathered=self.keep_gathered)

    def compression(self, cluster: Cluster) -> Compression:
        weights, grads = _named(self.weights, cluster), _named(self.grads, cluster)
        return Compression(weights=weights, grads=grads, **self.coding._asdict())

    def to_plan(self, setting: Setting) -> Plan:
        """The document that the trainer runs. Only for `runnable` candidates that divide the batch."""
        assert self.runnable and self.accumulate(setting) > 0
        levels = setting.cluster.shape
        return Plan(
            levels=levels,
            partition=self.partition(setting.cluster),
            compression=self.compression(setting.cluster),
            sync=None if self.sync is None else self.sync.rounds(levels),
            recompute="full" if self.recompute == "full" else "none",
            compute_dtype=setting.compute_dtype,
            bucket_bytes=self.bucket_bytes,
            micro_batch=self.micro_batch,
            accumulate=self.accumulate(setting),
        )


def _named(codecs: tuple[CodecName | None, ...], cluster: Cluster) -> dict[str, CodecName]:
    return {name: codec for name, codec in zip(cluster.level_names, codecs, strict=False) if codec is not None}
