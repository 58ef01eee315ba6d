"""The frozen decision: where every state lives, how often and how precisely replicas synchronise. Both wings read it.

A plan is the same on every rank: its digest is compared when a world forms. Names such as `zero3` or `hsdp` resolve to
points of one space; there is no code path of its own for any of them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from thinwire.cluster.cluster import Cluster, show_levels
from thinwire.config import Frozen, explain, read_document
from thinwire.errors import PlanError
from thinwire.plan.compression import Compression
from thinwire.plan.partition import REPLICA, Partition, resolve_partition
from thinwire.plan.sync import Sync, SyncConfig
from thinwire.units import Bytes

Recompute = Literal["none", "full"]
ComputeDtype = Literal["fp64", "fp32", "bf16"]


class Plan(Frozen):
    """Every decision of a run. `levels` repeats names and fanouts of the cluster the plan was made for."""

    renamed: ClassVar[Mapping[str, str]] = {"wire": "compression"}
    version: Literal[1] = 1
    levels: tuple[tuple[str, int], ...] = Field(min_length=1)
    partition: Partition = Partition()
    compression: Compression = Compression()
    sync: Sync | None = None
    """How replicas synchronise across a level and those outside it; without it they synchronise every step."""
    recompute: Recompute = "none"
    compute_dtype: ComputeDtype = "fp32"
    bucket_bytes: int | None = Field(default=None, ge=0, le=2**40)
    """Up to this size units travel together, as one message; none: what suits the links; 0: every unit by itself."""
    micro_batch: int = Field(default=1, ge=1, le=10**9)
    """Sequences per rank in one forward and backward."""
    accumulate: int = Field(default=1, ge=1, le=10**9)
    """Micro-batches per rank and optimizer step."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = self.level_names
        try:
            self.partition.depths(names)
        except PlanError as error:
            raise ValueError(str(error)) from None
        if self.sync is not None:
            self._sync_fits(self.sync)
        for direction in ("weights", "grads"):
            for level in getattr(self.compression, direction):
                if level not in names:
                    raise ValueError(f"compression.{direction} names the level {level!r}; there are {', '.join(names)}")
        lp, _, lo = self.depths
        for level, codec in self.compression.weights.items():
            if codec.startswith("delta-") and not lp < names.index(level) <= lo:
                raise ValueError(
                    f"compression.weights.{level} = {codec!r} needs a copy at the receiver between steps: {level} must lie "
                    f"outside the parameters' level and inside the optimizer's; partition is {self.partition}"
                )
        _, lg, _ = self.depths
        for level, codec in self.compression.grads.items():
            if codec == "lowrank" and self.sync is not None:
                raise ValueError(
                    f"compression.grads.{level} = 'lowrank' runs across the outermost level ({names[-1]}), which groups "
                    f"cross once a round under plan.sync: leave it out (sync.codec makes rounds smaller), or plan.sync"
                )
            if codec == "lowrank" and not lg < names.index(level) == len(names) - 1:
                raise ValueError(
                    f"compression.grads.{level} = 'lowrank' needs the outermost level ({names[-1]}) and gradients sharded "
                    f"inside it, so that it runs once a step; partition is {self.partition}"
                )
        if self.compression.error_feedback and "lowrank" in self.compression.grads.values():
            raise ValueError(
                "compression.error_feedback: lowrank carries over what it loses without being asked, and only one hop can; "
                "leave error_feedback out"
            )
        compressed = [level for level, codec in self.compression.grads.items() if codec != "fp32"]
        if self.compression.error_feedback and not any(names.index(level) > lg for level in compressed):
            raise ValueError(
                "compression.error_feedback needs a compressed gradient hop that runs once a step, outside the gradients' "
                f"level; partition is {self.partition}, compressed gradient levels are {', '.join(compressed) or 'none'}"
            )
        return self

    def _sync_fits(self, sync: Sync) -> None:
        names = self.level_names
        if sync.level not in names:
            raise ValueError(f"sync.level = {sync.level!r} is no level; there are {', '.join(names)}")
        inside = self.levels_in_group
        groups = math.prod(fanout for _, fanout in self.levels[inside:])
        if sync.groups != groups:
            raise ValueError(f"sync is for {sync.groups} groups across {sync.level}, there are {groups}")
        if sync.sum_inside is not None:
            self._sums_fit(sync, sync.sum_inside)
        if max(self.depths) >= inside:
            raise ValueError(
                f"partition {self.partition} reaches across {sync.level}, where groups synchronise once a round; shard "
                f"states over {names[inside - 1] if inside else REPLICA} at most"
            )
        for direction in ("weights", "grads"):
            for level in names[inside:]:
                if level in getattr(self.compression, direction):
                    raise ValueError(
                        f"compression.{direction}.{level}: nothing crosses {level} step by step; set sync.codec instead"
                    )

    def _sums_fit(self, sync: Sync, inside: str) -> None:
        first, names = self.level_names.index(sync.level), self.level_names
        if inside not in names[first:-1]:
            raise ValueError(f"sync.sum_inside = {inside!r} is no level between {sync.level} and the outermost one")
        summed = math.prod(fanout for _, fanout in self.levels[first : names.index(inside) + 1])
        if sync.summed != summed:
            raise ValueError(f"sync adds up {sync.summed} groups inside {inside}, there are {summed}")

    @property
    def levels_in_group(self) -> int:
        """How many levels, from the innermost, lie inside a worker group; all without `sync`."""
        return len(self.levels) if self.sync is None else self.level_names.index(self.sync.level)

    def of_group(self) -> "Plan":
        """What the ranks of one worker group do among themselves, every step. Without `sync`: this plan."""
        if self.sync is None:
            return self
        return self.model_copy(update={"levels": self.levels[: self.levels_in_group] or (("rank", 1),), "sync": None})

    @property
    def level_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.levels)

    @property
    def depths(self) -> tuple[int, int, int]:
        """(lp, lg, lo): -1 for a replica, else an index into `levels`."""
        return self.partition.depths(self.level_names)

    @property
    def digest(self) -> str:
        """A hash of the whole document; equal digests mean equal plans."""
        left_out = (
            {"bucket_bytes"} if self.bucket_bytes is None else None
        )  # plans of before it have the digests they had
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_levels(self, cluster: Cluster, *, called: str = "the plan") -> None:
        """Raise PlanError unless the plan was made for the levels of `cluster`."""
        if self.levels != cluster.shape:
            made, there = show_levels(self.levels), show_levels(cluster.shape)
            raise PlanError(f"{called} is for the levels {made}, the cluster has {there}; make the plan anew")


class PlanConfig(Frozen):
    """`[plan]` of a run file: what the user decides about it."""

    renamed: ClassVar[Mapping[str, str]] = {"wire": "compression"}
    partition: Partition | str = "auto"
    """A name (auto, ddp, zero1, zero2, zero3, hsdp, mics, zero++, frontier, `amsp(P;G;O)`) or the three levels."""
    keep_gathered: bool = False
    compression: Compression | None = None
    """Where the partition's name brings codecs of its own (zero++), those given here count, level by level."""
    sync: SyncConfig | None = None
    """`[plan.sync]`: groups synchronise once a round across a level and those outside it, instead of every step."""
    recompute: Recompute = "none"
    compute_dtype: ComputeDtype = "fp32"
    bucket_bytes: Bytes | None = Field(default=None, ge=0, le=2**40)
    """Up to this size units travel together (DDP's `bucket_cap_mb`); 0: every unit by itself. Default: by the links."""
    file: Path | None = None
    """A plan document, as `thinwire plan -o` writes it; it decides everything, so nothing else may be given."""

    @model_validator(mode="after")
    def _file_alone(self) -> Self:
        others = sorted(name for name in self.model_fields_set - {"file"} if getattr(self, name) != _DEFAULTS[name])
        if self.file is not None and others:
            raise ValueError(f"plan.file decides everything; leave out plan.{others[0]}, or leave out plan.file")
        return self

    @field_validator("partition", mode="before")
    @classmethod
    def _text_or_table(cls, value: object) -> object:
        return Partition.model_validate(value) if isinstance(value, dict) else value

    def resolve(self, cluster: Cluster, *, micro_batch: int, accumulate: int) -> Plan:
        """The plan for `cluster`. Raises PlanError with one sentence."""
        if self.file is not None:
            return read_plan(self.file, cluster, sequences=micro_batch * accumulate)
        named, levels = self.partition, cluster.shape
        sync = None if self.sync is None else self.sync.resolve(levels)
        inner = cluster.level_names if sync is None else cluster.level_names[: cluster.index(sync.level)]
        partition, compression = resolve_partition(named, inner) if isinstance(named, str) else (named, Compression())
        if self.keep_gathered:
            partition = partition.model_copy(update={"keep_gathered": True})
        try:
            return Plan(
                levels=levels,
                partition=partition,
                compression=compression if self.compression is None else self.compression.over(compression),
                sync=sync,
                recompute=self.recompute,
                compute_dtype=self.compute_dtype,
                bucket_bytes=self.bucket_bytes,
                micro_batch=micro_batch,
                accumulate=accumulate,
            )
        except ValidationError as error:
            raise PlanError(f"plan: {explain(error)}") from None


_DEFAULTS: Mapping[str, object] = {name: field.default for name, field in PlanConfig.model_fields.items()}


def read_plan(path: Path, cluster: Cluster, *, sequences: int) -> Plan:
    """The plan document at `path`, for `cluster` and `sequences` sequences per rank and step. Raises PlanError."""
    way_out = "write a plan with thinwire plan RUN.toml -o PLAN.json"
    plan = read_document(path, Plan, what="plan of version 1", error=PlanError, way_out=way_out)
    plan.check_levels(cluster, called=str(path))
    if plan.micro_batch * plan.accumulate != sequences:
        raise PlanError(
            f"{path} gives a rank {plan.micro_batch} x {plan.accumulate} sequences per step, batch.sequences gives it "
            f"{sequences}; make the plan anew, or set batch.sequences = {plan.micro_batch * plan.accumulate * cluster.ranks}"
        )
    return plan
