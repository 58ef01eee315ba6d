"""Why not that one? What a named plan violates first, and the smallest change that mends it; or by how much it is slower.

Plans are named as people write them: `tensor=8,pipeline=4,recompute=full,partition=zero3`. What the name leaves open is
chosen as well as it can be, so that the answer holds for every plan of that name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args

from thinwire.errors import PlanError
from thinwire.plan.partition import resolve_partition
from thinwire.planner.search import Ranked, SearchResult, fits, search
from thinwire.planner.space import Space, show_axes, show_states
from thinwire.predict.candidate import Candidate, Recompute, Setting
from thinwire.units import divisors, whole_number

_SLOW = {
    "matmul_s": "its matmuls are smaller or repeated",
    "memory_s": "more element-wise work",
    "launch_s": "its kernels are so small that launching them takes longer",
    "tensor_s": "collectives of the tensor axis",
    "context_s": "keys and values going round the context axis",
    "data_s": "collectives of the data axis that nothing hides",
    "bubble_s": "waiting for other pipeline stages",
    "send_s": "messages between pipeline stages",
    "optimizer_s": "a larger share of the optimizer on each rank",
    "outer_s": "stalls for outer rounds",
}


def why_not(text: str, setting: Setting, space: Space, best: Ranked) -> str:
    """One sentence about the plan that `text` names. Raises PlanError if it says nothing sensible."""
    fields = parse(text, setting)
    check(fields, setting)
    wider = replace(space, fixed=fields, runnable=False)
    try:
        found = search(setting, wider, keep=1)
    except PlanError as error:
        return f"{text}: {error}"
    if not found.best:
        return f"{text}: {_too_large(setting, wider, found)}"
    named = found.best[0]
    chosen = f"{show_axes(named.candidate, setting)} {show_states(named.candidate, setting)}"
    ratio = named.time.total / best.time.total - 1
    if ratio <= 0.001:
        return f"{text}: as fast as the best plan ({chosen})"
    unmarked = (
        f"; the trainer does not run {', '.join(named.candidate.not_run_yet)} yet"
        if named.candidate.not_run_yet
        else ""
    )
    if ratio < 0:
        return f"{text}: faster by {-ratio:.0%} than the best that may be chosen{unmarked}"
    cause = _main_cause(named, best, setting)
    return f"{text}: slower by {ratio:.0%} ({named.time.total:.3g} s with {chosen}): {cause}{unmarked}"


def _main_cause(named: Ranked, best: Ranked, setting: Setting) -> str:
    """The cause that adds most seconds over the best plan."""
    more = {name: getattr(named.time, name) - getattr(best.time, name) for name in _SLOW}
    name = max(more, key=lambda key: more[key])
    where = ""
    if name in ("tensor_s", "context_s"):
        hops = named.axes.tensor if name == "tensor_s" else named.axes.context
        outer = [setting.cluster.level_names[hop.level] for hop in hops if hop.level > 0]
        where = f": the axis crosses level {outer[-1]!r}" if outer else ""
    return f"{more[name]:+.3g} s of {_SLOW[name]}{where}"


def _too_large(setting: Setting, space: Space, found: SearchResult) -> str:
    capacity = setting.cluster.device.memory_bytes
    assert capacity and found.closest is not None
    closest, _, memory = found.closest
    text = f"needs {memory.total / 2**30:.1f} of {capacity / 2**30:.1f} GiB at stage {memory.stage}, and 5% to spare"
    for change in _changes(space.fixed, closest):
        fields = {**space.fixed, **change}
        try:
            check(fields, setting)
            if fits(setting, replace(space, fixed=fields)):
                return f"{text}; {', '.join(f'{key}={value}' for key, value in change.items())} would fit"
        except PlanError:
            continue
    return f"{text}; no single doubling of an axis would fit"


def _changes(fixed: Mapping[str, object], closest: Candidate) -> Iterator[dict[str, object]]:
    """Changes from small to large that lower memory."""
    if fixed.get("recompute", "full") != "full":
        yield {"recompute": "full"}
    if fixed.get("micro_batch", 1) != 1:
        yield {"micro_batch": 1}
    for factor in (2, 4, 8):
        for axis in ("pipeline", "tensor", "context"):
            if axis in fixed:
                yield {axis: getattr(closest, axis) * factor}


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
    partition, compression = resolve_partition(value, levels)
    found: dict[str, object] = {"depths": partition.depths(levels)}
    if compression.weights:
        found["weights"] = tuple(compression.weights.get(level) for level in levels)
        found["grads"] = tuple(compression.grads.get(level) for level in levels)
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
    for key, total, what in rules:
        value = fields.get(key)
        if isinstance(value, int) and total % value:
            nearest = min(divisors(total), key=lambda n: abs(n - value))
            raise PlanError(f"{key}={value} does not divide {what}; the nearest that does is {key}={nearest}")
    pipeline = fields.get("pipeline", 1)
    assert isinstance(pipeline, int)
    if pipeline > spec.layers:
        raise PlanError(f"pipeline={pipeline} has more stages than the model's {spec.layers} blocks")
