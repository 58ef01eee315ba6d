"""The frozen decision: where every state lives, how often and how precisely replicas agree. Both wings read it.

A plan is the same on every rank: `plan.digest` is compared when a world forms. Names resolve to points of one space
(`resolve_partition`): there is no code path of its own for DDP, ZeRO, HSDP, MiCS or ZeRO++.
"""

import hashlib
import json
from typing import Literal, Self

from pydantic import Field, model_validator

from thinwire.cluster.cluster import Cluster
from thinwire.config import Frozen

Direction = Literal["weights", "grads"]
Recompute = Literal["none", "full"]
ComputeDtype = Literal["fp64", "fp32", "bf16"]
REPLICA = "replica"


class Partition(Frozen):
    """The cut of the three states: `"replica"`, or the level over which (and everything inside it) the state is cut."""

    params: str = REPLICA
    grads: str = REPLICA
    optimizer: str = REPLICA
    keep_gathered: bool = False
    """Keep a unit's gathered weights from forward to backward: more memory, one all-gather less."""


class Plan(Frozen):
    """Every decision of a run. `levels` repeats names and fanouts of the cluster the plan was made for."""

    version: Literal[1] = 1
    levels: tuple[tuple[str, int], ...] = Field(min_length=1)
    partition: Partition = Partition()
    recompute: Recompute = "none"
    compute_dtype: ComputeDtype = "fp32"
    micro_batch: int = Field(default=1, ge=1)
    """Sequences per rank in one forward and backward."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per rank and optimizer step."""

    @model_validator(mode="after")
    def _known_levels(self) -> Self:
        names = [name for name, _ in self.levels]
        for state in ("params", "grads", "optimizer"):
            level = getattr(self.partition, state)
            if level != REPLICA and level not in names:
                raise ValueError(f"partition.{state} = {level!r} is no level; there are replica, {', '.join(names)}")
        return self

    @property
    def ranks(self) -> int:
        size = 1
        for _, fanout in self.levels:
            size *= fanout
        return size

    @property
    def digest(self) -> str:
        """A hash of the whole document; equal digests mean equal plans."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class PlanConfig(Frozen):
    """`[plan]` of a run file: what the user decides about it."""

    recompute: Recompute = "none"
    compute_dtype: ComputeDtype = "fp32"

    def resolve(self, cluster: Cluster, *, micro_batch: int, accumulate: int) -> Plan:
        """The plan for `cluster`."""
        return Plan(
            levels=tuple((level.name, level.fanout) for level in cluster.levels),
            recompute=self.recompute,
            compute_dtype=self.compute_dtype,
            micro_batch=micro_batch,
            accumulate=accumulate,
        )
