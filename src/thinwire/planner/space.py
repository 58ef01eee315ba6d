"""The space: every candidate that divides the model, the batch and the levels. No costs here.

A core fixes the axes, the micro-batch and recomputation; its partitions and codecs are enumerated for the cores that are
worth it. Axes are enumerated from divisors; an axis that would split a level askew is left out by `place`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import Any, Literal

from pydantic import ValidationError

from thinwire.plan.compression import CodecName
from thinwire.plan.partition import Partition
from thinwire.plan.plan import Plan
from thinwire.predict.candidate import Candidate, CandidateSync, Recompute, Setting
from thinwire.predict.placement import Axes
from thinwire.units import divisors

Codecs = Literal["none", "bf16", "all"]
COMPRESSION = ("weights", "grads", "coding")
"""Fields of a candidate that say how states travel."""


@dataclass(frozen=True)
class Space:
    """What may be chosen."""

    runnable: bool = False
    """Only what `thinwire train` runs today."""
    codecs: Codecs = "all"
    """Which codecs gradients and weights may travel under outside the innermost level."""
    sync: CandidateSync | None = None
    """Outer synchronisation, if the plans are to have it."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a candidate that are decided already."""
    min_tokens: int = 1024
    """Least part of a sequence that a context rank keeps."""
    max_tensor: int = 256
    max_micro_batch: int = 64

    def allows(self, candidate: Candidate, *, partition: bool = False) -> bool:
        """Whether a core (with `partition`: also its partition and codecs) has every field that is decided."""
        names = [name for name in self.fixed if partition or name not in ("depths", "keep_gathered", *COMPRESSION)]
        return all(getattr(candidate, name) == self.fixed[name] for name in names)


def cores(setting: Setting, space: Space) -> Iterator[Candidate]:
    """Candidates without partition and codecs; a few of them lie askew on the levels."""
    spec, ranks = setting.spec, setting.cluster.ranks
    groups = space.sync.groups(setting.cluster) if space.sync else 1
    inside = ranks // groups
    for tensor in _tensors(setting, space, inside):
        for context in _contexts(setting, space, inside // tensor):
            for pipeline in [1] if space.runnable else divisors(inside // tensor // context):
                if pipeline > spec.layers:
                    continue
                data = inside // (tensor * context * pipeline)
                if setting.sequences % (data * groups):
                    continue
                shape = (tensor, context, pipeline)
                yield from _details(setting, space, shape, data, setting.sequences // (data * groups))


def _tensors(setting: Setting, space: Space, inside: int) -> list[int]:
    if space.runnable:
        return [1]
    spec = setting.spec
    fits = [t for t in divisors(inside) if spec.heads % t == 0 and spec.ffn % t == 0 and t <= space.max_tensor]
    return [t for t in fits if spec.kv_heads % t == 0 or t % spec.kv_heads == 0]


def _contexts(setting: Setting, space: Space, left: int) -> list[int]:
    if space.runnable:
        return [1]
    most = setting.tokens // space.min_tokens
    return [c for c in divisors(left) if c == 1 or (c <= most and setting.tokens % (2 * c) == 0)]


def _details(setting: Setting, space: Space, shape: tuple[int, int, int], data: int, share: int) -> Iterator[Candidate]:
    tensor, context, pipeline = shape
    recomputes: list[Recompute] = ["none", "full"]
    if not setting.framework.flash_attention:
        recomputes.insert(1, "selective")
    orders = [True, False] if pipeline > 1 and data > 1 else [True]
    for micro_batch in divisors(share):
        if micro_batch > space.max_micro_batch:
            break
        for chunks in _chunks(setting.spec.layers, pipeline, share // micro_batch):
            for recompute in recomputes:
                for outside in orders:
                    yield Candidate(tensor, context, pipeline, chunks, outside, micro_batch, recompute, sync=space.sync)


def _chunks(layers: int, pipeline: int, micro_batches: int) -> list[int]:
    """Interleaving needs equal chunks and micro-batches in whole rounds of the pipeline (arXiv 2104.04473)."""
    if pipeline == 1 or layers % pipeline or micro_batches % pipeline:
        return [1]
    return [v for v in divisors(layers // pipeline) if v <= 8]


def partitions(setting: Setting, space: Space, core: Candidate, axes: Axes) -> Iterator[Candidate]:
    """Every legal partition of `core` over the levels that its states axis crosses, with every set of codecs."""
    depths = [-1, *(hop.level for hop in axes.states)]
    for lp, lg, lo in combinations_with_replacement(depths, 3):
        keeps = [False, True] if lp >= 0 else [False]
        for keep in keeps:
            candidate = replace(core, depths=(lp, lg, lo), keep_gathered=keep)
            yield from with_codecs(setting, space, candidate, axes)


def with_codecs(setting: Setting, space: Space, candidate: Candidate, axes: Axes) -> Iterator[Candidate]:
    """The candidate as it is and with codecs on every level but the innermost; or with those that are decided."""
    decided = {name: space.fixed[name] for name in COMPRESSION if name in space.fixed}
    if decided:
        chosen = replace(candidate, **decided)
        if _carries(chosen, setting):
            yield chosen
        return
    yield candidate
    levels = {hop.level for hop in axes.states if hop.level > 0}
    if not levels or space.codecs == "none":
        return
    sets: list[tuple[CodecName | None, CodecName]] = [(None, "bf16")]
    if space.codecs == "all":
        sets += [("int8", "int8"), ("int8", "int4")]
    for weights, grads in sets:
        yield replace(
            candidate,
            weights=_per_level(setting, levels, weights) if weights else (),
            grads=_per_level(setting, levels, grads),
        )


def _carries(chosen: Candidate, setting: Setting) -> bool:
    """Whether codecs that a user decided go with the partition: deltas and error feedback do not with every one."""
    cluster = setting.cluster
    levels = cluster.shape
    try:
        Plan(levels=levels, partition=chosen.partition(cluster), compression=chosen.compression(cluster))
    except ValidationError:
        return False
    return True


def _per_level(setting: Setting, levels: set[int], codec: CodecName) -> tuple[CodecName | None, ...]:
    return tuple(codec if index in levels else None for index in range(len(setting.cluster.levels)))


def shape_of(candidate: Candidate) -> tuple[object, ...]:
    """What makes two plans different to a reader: axes, recomputation and partition; not codecs or the micro-batch."""
    return candidate.tensor, candidate.context, candidate.pipeline, candidate.recompute, candidate.depths


def show_axes(candidate: Candidate, setting: Setting) -> str:
    """`tensor=8 pipeline=4x2 data=16`, ones left out."""
    parts = [f"{name}={getattr(candidate, name)}" for name in ("tensor", "context") if getattr(candidate, name) > 1]
    if candidate.pipeline > 1:
        chunks = f"x{candidate.chunks}" if candidate.chunks > 1 else ""
        parts.append(f"pipeline={candidate.pipeline}{chunks}{'' if candidate.pipeline_outside else ' (inside data)'}")
    parts.append(f"data={candidate.data(setting.cluster)}")
    if candidate.sync:
        parts.append(f"groups={candidate.groups(setting.cluster)}")
    return " ".join(parts)


def show_states(candidate: Candidate, setting: Setting) -> str:
    """The partition, and the codecs on the wire."""
    partition: Partition = candidate.partition(setting.cluster)
    text = str(partition) + (" kept" if candidate.keep_gathered else "")
    codecs = sorted({codec for codec in (*candidate.weights, *candidate.grads) if codec})
    return text + (f" {'+'.join(codecs)}" if codecs else "")


def show_sync(candidate: Candidate) -> str:
    sync = candidate.sync
    if sync is None:
        return ""
    fragments = "" if sync.fragments == 1 else f" in {sync.fragments} fragments"
    behind = f", behind {sync.overlap_steps} of them" if sync.overlap_steps else ""
    return f"groups synchronise every {sync.inner_steps} steps{fragments}, {sync.codec}{behind}"
