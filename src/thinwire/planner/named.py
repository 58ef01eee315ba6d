"""Plans as people write them, `tensor=8,pipeline=4,recompute=full,partition=zero3`, and as a table shows them."""

from collections.abc import Mapping
from typing import get_args

from thinwire.errors import PlanError
from thinwire.plan.partition import Partition, resolve_partition
from thinwire.predict.candidate import Candidate, Recompute, Setting
from thinwire.units import divisors, whole_number

NUMBERS = ("tensor", "context", "pipeline", "chunks", "micro_batch")
KEYS = (*NUMBERS, "recompute", "order", "partition")


def parse(text: str, setting: Setting) -> dict[str, object]:
    """Fields of a candidate that `text` decides. Raises PlanError with one sentence."""
    fields: dict[str, object] = {}
    for part in _parts(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in KEYS:
            raise PlanError(
                f"{part!r} is no part of a plan; write for example tensor=8,pipeline=4, of {', '.join(KEYS)}"
            )
        fields |= _field(key, value, setting)
    return fields


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _field(key: str, value: str, setting: Setting) -> dict[str, object]:
    if key in NUMBERS:
        number = whole_number(value)
        if not number:
            raise PlanError(f"{key} = {value[:40]!r} is not a whole number above 0 (and at most 1,000,000,000)")
        return {key: number}
    if key == "recompute":
        if value not in get_args(Recompute):
            raise PlanError(f"recompute = {value!r} is unknown; there are {', '.join(get_args(Recompute))}")
        return {key: value}
    if key == "order":
        if value not in ("pipeline-outside", "data-outside"):
            raise PlanError(f"order = {value!r} is unknown; there are pipeline-outside and data-outside")
        return {"pipeline_outside": value == "pipeline-outside"}
    levels = setting.cluster.level_names
    partition, wire = resolve_partition(value, levels)
    found: dict[str, object] = {"depths": partition.depths(levels)}
    if wire.weights:
        found["weights"] = tuple(wire.weights.get(level) for level in levels)
        found["grads"] = tuple(wire.grads.get(level) for level in levels)
    return found


def check(fields: Mapping[str, object], setting: Setting) -> None:
    """Raise PlanError, with the nearest that would divide, if an axis that is decided divides nothing."""
    spec, ranks = setting.spec, setting.cluster.ranks
    rules = [
        ("tensor", spec.heads, f"the model's {spec.heads} heads"),
        ("tensor", spec.ffn, f"the model's feed-forward width of {spec.ffn}"),
        ("tensor", ranks, f"the cluster's {ranks} ranks"),
        ("context", setting.tokens, f"{setting.tokens} tokens"),
        ("context", ranks, f"the cluster's {ranks} ranks"),
        ("pipeline", ranks, f"the cluster's {ranks} ranks"),
    ]
    for key, whole, what in rules:
        value = fields.get(key)
        if isinstance(value, int) and whole % value:
            nearest = min(divisors(whole), key=lambda n: abs(n - value))
            raise PlanError(f"{key}={value} does not divide {what}; the nearest that does is {key}={nearest}")
    pipeline = fields.get("pipeline", 1)
    assert isinstance(pipeline, int)
    if pipeline > spec.layers:
        raise PlanError(f"pipeline={pipeline} has more stages than the model's {spec.layers} blocks")


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
    """The cut, and the codecs on the wire."""
    cut: Partition = candidate.partition(setting.cluster)
    text = str(cut) + (" kept" if candidate.keep_gathered else "")
    codecs = sorted({codec for codec in (*candidate.weights, *candidate.grads) if codec})
    return text + (f" {'+'.join(codecs)}" if codecs else "")


def show_sync(candidate: Candidate) -> str:
    sync = candidate.sync
    if sync is None:
        return ""
    fragments = "" if sync.fragments == 1 else f" in {sync.fragments} fragments"
    behind = f", behind {sync.overlap_steps} of them" if sync.overlap_steps else ""
    return f"groups agree every {sync.inner_steps} steps{fragments}, {sync.codec}{behind}"
