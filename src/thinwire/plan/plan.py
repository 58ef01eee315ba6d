"""The frozen decision: where every state lives, how often and how precisely replicas agree. Both wings read it.

A plan is the same on every rank: its digest is compared when a world forms. Names such as `zero3` or `hsdp` resolve to
points of one space; there is no code path of its own for any of them.

The three states are cut over levels lp (parameters), lg (gradients) and lo (optimizer states), each with everything
inside it; legal is lp <= lg <= lo from inner to outer, as in AMSP (arXiv 2311.00257): a rank never holds gradients or
optimizer states of parameters that it does not own. With frozen weights lg < lp is sensible too (PaRO, 2310.06003).
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from thinwire.cluster.cluster import Cluster
from thinwire.config import Frozen, explain, read_document
from thinwire.errors import PlanError
from thinwire.plan.compression import CodecName, Rounding
from thinwire.plan.sync import Sync, SyncConfig

Direction = Literal["weights", "grads"]
Recompute = Literal["none", "full"]
ComputeDtype = Literal["fp64", "fp32", "bf16"]
REPLICA, ALL = "replica", "all"
NAMES = ("auto", "ddp", "zero1", "zero2", "zero3", "hsdp", "mics", "zero++", "frontier")


class Partition(Frozen):
    """The cut of the three states: `"replica"`, or the level over which (and everything inside it) the state is cut."""

    params: str = REPLICA
    grads: str = REPLICA
    optimizer: str = REPLICA
    keep_gathered: bool = False
    """Gather a unit's weights once a step and keep them to its last backward: more memory, fewer bytes."""
    frozen_weights: bool = False
    """Most weights are frozen: gradients may be cut less than parameters; trained weights then live with them."""

    def depths(self, levels: Sequence[str]) -> tuple[int, int, int]:
        """(lp, lg, lo) as indices into `levels`, inner to outer; -1 is `replica`. Raises PlanError if illegal."""
        lp, lg, lo = (_depth(getattr(self, name), levels, name) for name in ("params", "grads", "optimizer"))
        if not _legal((lp, lg, lo), frozen_weights=self.frozen_weights):
            nearest = _nearest_legal((lp, lg, lo), len(levels), frozen_weights=self.frozen_weights)
            rule = (
                "even with frozen weights neither parameters nor gradients may be cut further out than optimizer states"
                if self.frozen_weights
                else "parameters may not be cut further out than gradients, nor gradients than optimizer states"
            )
            raise PlanError(
                f"partition {self} is illegal: {rule}; the nearest legal one is "
                f"({'; '.join(_named(depth, levels) for depth in nearest)})"
            )
        return lp, lg, lo

    def __str__(self) -> str:
        return f"({self.params}; {self.grads}; {self.optimizer})"


Depths = tuple[int, int, int]


def _legal(depths: Depths, *, frozen_weights: bool) -> bool:
    lp, lg, lo = depths
    return lp <= lo and lg <= lo and (lp <= lg or frozen_weights)


def _nearest_legal(depths: Depths, levels: int, *, frozen_weights: bool) -> Depths:
    """The legal point with the fewest states changed, then by the fewest levels, then the one cut furthest out."""

    def distance(other: Depths) -> tuple[int, int, int]:
        moved = [abs(new - old) for new, old in zip(other, depths, strict=True)]
        return sum(by > 0 for by in moved), sum(moved), -sum(other)

    every = range(-1, levels)
    return min(
        (point for point in itertools.product(every, every, every) if _legal(point, frozen_weights=frozen_weights)),
        key=distance,
    )


def _named(depth: int, levels: Sequence[str]) -> str:
    return REPLICA if depth < 0 else levels[depth]


def _depth(name: str, levels: Sequence[str], state: str) -> int:
    if name == REPLICA:
        return -1
    if name == ALL:
        return len(levels) - 1
    if name not in levels:
        raise PlanError(f"partition.{state} = {name!r} is no level; there are {REPLICA}, {', '.join(levels)} and {ALL}")
    return list(levels).index(name)


class Wire(Frozen):
    """How numbers travel: a codec per level and direction; what is not named travels as it is."""

    weights: Mapping[str, CodecName] = Field(default_factory=dict)
    grads: Mapping[str, CodecName] = Field(default_factory=dict)
    block: Literal[64, 128, 256] = 128
    """Numbers that share a scale."""
    rank: int = Field(default=4, ge=1, le=10**5)
    """Columns of the two matrices that `lowrank` sends for each one."""
    rank_from: int = Field(default=2, ge=0, le=10**12)
    """Steps at the start whose gradients are summed whole before `lowrank` begins (PyTorch: `start_powerSGD_iter`)."""
    rounding: Rounding = "nearest"
    error_feedback: bool = False
    """Carry what the outermost coded gradient hop loses over to the next step."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for level, codec in self.weights.items():
            if codec == "lowrank":
                raise ValueError(
                    f"weights.{level} = 'lowrank': it sums gradients, it cannot carry weights; use it in grads"
                )
        for level, codec in self.grads.items():
            if codec.startswith("delta-"):
                raise ValueError(
                    f"grads.{level} = {codec!r}: a delta needs something the receiver holds; use it for weights"
                )
        return self

    @property
    def coded(self) -> bool:
        """Whether any level has a codec that needs whole blocks."""
        return any(
            codec not in ("fp32", "bf16", "fp16", "lowrank") for codec in (*self.weights.values(), *self.grads.values())
        )

    @property
    def whole_steps(self) -> int:
        """Steps at the start that send more than those after them."""
        return self.rank_from if "lowrank" in self.grads.values() else 0

    def over(self, named: "Wire") -> "Wire":
        """This, and at levels that it does not name the codecs of `named`."""
        weights, grads = {**named.weights, **self.weights}, {**named.grads, **self.grads}
        return self.model_copy(update={"weights": weights, "grads": grads})


class Plan(Frozen):
    """Every decision of a run. `levels` repeats names and fanouts of the cluster the plan was made for."""

    version: Literal[1] = 1
    levels: tuple[tuple[str, int], ...] = Field(min_length=1)
    partition: Partition = Partition()
    wire: Wire = Wire()
    sync: Sync | None = None
    """How worker groups agree across a level and those outside it; without it they agree every step."""
    recompute: Recompute = "none"
    compute_dtype: ComputeDtype = "fp32"
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
            for level in getattr(self.wire, direction):
                if level not in names:
                    raise ValueError(f"wire.{direction} names the level {level!r}; there are {', '.join(names)}")
        lp, _, lo = self.depths
        for level, codec in self.wire.weights.items():
            if codec.startswith("delta-") and not lp < names.index(level) <= lo:
                raise ValueError(
                    f"wire.weights.{level} = {codec!r} needs a copy at the receiver between steps: {level} must lie outside "
                    f"the parameters' level and inside the optimizer's; partition is {self.partition}"
                )
        _, lg, _ = self.depths
        for level, codec in self.wire.grads.items():
            if codec == "lowrank" and self.sync is not None:
                raise ValueError(
                    f"wire.grads.{level} = 'lowrank' runs across the outermost level ({names[-1]}), which groups cross "
                    f"once a round under plan.sync: leave it out (sync.codec makes rounds smaller), or leave plan.sync out"
                )
            if codec == "lowrank" and not lg < names.index(level) == len(names) - 1:
                raise ValueError(
                    f"wire.grads.{level} = 'lowrank' needs the outermost level ({names[-1]}) and gradients cut inside it, "
                    f"so that it runs once a step; partition is {self.partition}"
                )
        if self.wire.error_feedback and "lowrank" in self.wire.grads.values():
            raise ValueError(
                "wire.error_feedback: lowrank carries over what it loses without being asked, and only one hop can; leave "
                "error_feedback out"
            )
        coded = [level for level, codec in self.wire.grads.items() if codec != "fp32"]
        if self.wire.error_feedback and not any(names.index(level) > lg for level in coded):
            raise ValueError(
                "wire.error_feedback needs a coded gradient hop that runs once a step, outside the gradients' level; "
                f"partition is {self.partition}, coded gradient levels are {', '.join(coded) or 'none'}"
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
                f"partition {self.partition} reaches across {sync.level}, where groups agree once a round; cut states over "
                f"{names[inside - 1] if inside else REPLICA} at most"
            )
        for direction in ("weights", "grads"):
            for level in names[inside:]:
                if level in getattr(self.wire, direction):
                    raise ValueError(
                        f"wire.{direction}.{level}: nothing crosses {level} step by step; set sync.codec instead"
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
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class PlanConfig(Frozen):
    """`[plan]` of a run file: what the user decides about it."""

    partition: Partition | str = "auto"
    """A name (auto, ddp, zero1, zero2, zero3, hsdp, mics, zero++, frontier, `amsp(P;G;O)`) or the three levels."""
    keep_gathered: bool = False
    wire: Wire | None = None
    """Where the partition's name brings codecs of its own (zero++), those given here count, level by level."""
    sync: SyncConfig | None = None
    """`[plan.sync]`: groups agree once a round across a level and those outside it, instead of every step."""
    recompute: Recompute = "none"
    compute_dtype: ComputeDtype = "fp32"
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
        named, levels = self.partition, tuple((level.name, level.fanout) for level in cluster.levels)
        sync = None if self.sync is None else self.sync.resolve(levels)
        inner = cluster.level_names if sync is None else cluster.level_names[: cluster.index(sync.level)]
        partition, wire = resolve_partition(named, inner) if isinstance(named, str) else (named, Wire())
        if self.keep_gathered:
            partition = partition.model_copy(update={"keep_gathered": True})
        try:
            return Plan(
                levels=levels,
                partition=partition,
                wire=wire if self.wire is None else self.wire.over(wire),
                sync=sync,
                recompute=self.recompute,
                compute_dtype=self.compute_dtype,
                micro_batch=micro_batch,
                accumulate=accumulate,
            )
        except ValidationError as error:
            raise PlanError(f"plan: {explain(error)}") from None


_DEFAULTS: Mapping[str, object] = {name: field.default for name, field in PlanConfig.model_fields.items()}


def read_plan(path: Path, cluster: Cluster, *, sequences: int) -> Plan:
    """The plan document at `path`, for `cluster` and `sequences` sequences a rank and step. Raises PlanError."""
    way_out = "write a plan with thinwire plan RUN.toml -o PLAN.json"
    plan = read_document(path, Plan, what="plan of version 1", error=PlanError, way_out=way_out)
    levels = tuple((level.name, level.fanout) for level in cluster.levels)
    if plan.levels != levels:
        told = (" x ".join(f"{name}={fanout}" for name, fanout in pairs) for pairs in (plan.levels, levels))
        raise PlanError("{} is for the levels {}, the cluster has {}; make the plan anew".format(path, *told))
    if plan.micro_batch * plan.accumulate != sequences:
        raise PlanError(
            f"{path} gives a rank {plan.micro_batch} x {plan.accumulate} sequences a step, batch.sequences gives it "
            f"{sequences}; make the plan anew, or set batch.sequences = {plan.micro_batch * plan.accumulate * cluster.ranks}"
        )
    return plan


def resolve_partition(name: str, levels: Sequence[str]) -> tuple[Partition, Wire]:
    """The point that a name means on `levels` (inner to outer), and the codecs that belong to it.

    `node` below is the level of that name, else the outermost but one, else the only one. Raises PlanError.

    ddp: everything replicated. zero1/2/3 (arXiv 1910.02054): optimizer states, also gradients, also parameters cut over
    all. hsdp, mics (2205.00119): all three cut over the node. zero++ (2306.10209): parameters over the node, the rest
    over all, int8 weights and int4 gradients between nodes. frontier (2501.04266): parameters over the innermost level,
    gradients over the node, optimizer states over all. auto: parameters and gradients over the node, optimizer states
    over all; on a single level, where a node is one rank, that is zero1. amsp(P;G;O) (2311.00257): spelled out.
    """
    everything = levels[-1] if levels else REPLICA  # no level at all: a worker group of one rank
    node = "node" if "node" in levels else (levels[-2:] or (REPLICA,))[0]
    points = {
        "auto": (node, node, everything) if node != everything else (REPLICA, REPLICA, everything),
        "ddp": (REPLICA, REPLICA, REPLICA),
        "zero1": (REPLICA, REPLICA, everything),
        "zero2": (REPLICA, everything, everything),
        "zero3": (everything, everything, everything),
        "hsdp": (node, node, node),
        "mics": (node, node, node),
        "zero++": (node, everything, everything),
        "frontier": ((levels or (REPLICA,))[0], node, everything),
    }
    spelled = re.fullmatch(r"amsp\(([^;]+);([^;]+);([^;]+)\)", name.replace(" ", ""))
    if spelled is None and name not in points:
        raise PlanError(f"partition {name!r} is unknown; there are {', '.join(points)} and amsp(P;G;O)")
    params, grads, optimizer = spelled.groups() if spelled else points[name]
    partition = Partition(
        params=_outer(params, everything), grads=_outer(grads, everything), optimizer=_outer(optimizer, everything)
    )
    partition.depths(levels)
    if name != "zero++":
        return partition, Wire()
    between_nodes = list(levels)[list(levels).index(node) + 1 :] if levels else []
    if not between_nodes:
        raise PlanError(
            f"zero++ codes what crosses nodes, and here nothing does (levels: {', '.join(levels) or 'none'}): take zero3, "
            "which is the same cut without codecs, and name codecs in plan.wire if you want them"
        )
    return partition, Wire(weights=dict.fromkeys(between_nodes, "int8"), grads=dict.fromkeys(between_nodes, "int4"))


def _outer(name: str, everything: str) -> str:
    return everything if name == ALL else name
