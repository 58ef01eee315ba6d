"""Why not that one? What a named plan violates first, and the smallest change that mends it; or by how much it is slower.

What the name leaves open is chosen as well as it can be, so that the answer holds for every plan of that name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from thinwire.errors import PlanError
from thinwire.planner.named import check, parse, show_axes, show_states
from thinwire.planner.search import Found, Ranked, search
from thinwire.planner.space import Space
from thinwire.predict.candidate import Setting

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


def _too_large(setting: Setting, space: Space, found: Found) -> str:
    capacity = setting.cluster.device.memory_bytes
    assert capacity and found.closest is not None
    memory = found.closest.memory
    text = f"needs {memory.total / 2**30:.1f} of {capacity / 2**30:.1f} GiB at stage {memory.stage}, and 5% to spare"
    for change in _changes(space.fixed, found.closest):
        fields = {**space.fixed, **change}
        try:
            check(fields, setting)
            if search(setting, replace(space, fixed=fields), keep=1).best:
                return f"{text}; {', '.join(f'{key}={value}' for key, value in change.items())} would fit"
        except PlanError:
            continue
    return f"{text}; no single doubling of an axis would fit"


def _changes(fixed: Mapping[str, object], closest: Ranked) -> Iterator[dict[str, object]]:
    """Changes from small to large that lower memory."""
    if fixed.get("recompute", "full") != "full":
        yield {"recompute": "full"}
    if fixed.get("micro_batch", 1) != 1:
        yield {"micro_batch": 1}
    for factor in (2, 4, 8):
        for axis in ("pipeline", "tensor", "context"):
            if axis in fixed:
                yield {axis: getattr(closest.candidate, axis) * factor}


def fits_nowhere(setting: Setting, space: Space, found: Found) -> str:
    """What to change when no plan fits: a larger device, more of the outermost level, or shorter sequences."""
    capacity = setting.cluster.device.memory_bytes
    assert capacity and found.closest is not None
    closest = found.closest
    need = closest.memory.total * 1.05
    largest = max(
        ("params", "grads", "optimizer", "residual", "gathered", "activations", "live", "framework"),
        key=lambda name: getattr(closest.memory, name),
    )
    text = (
        f"no plan fits: the smallest needs {need / 2**30:.1f} of {capacity / 2**30:.1f} GiB at stage {closest.memory.stage} "
        f"({show_axes(closest.candidate, setting)} {show_states(closest.candidate, setting)}), most of it {largest}"
    )
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        larger = _with_more(setting, factor)
        try:
            if search(larger, space, keep=1).best:
                return f"{text}; {_more_of(setting, larger)} ({larger.cluster.ranks} ranks) would fit"
        except PlanError:
            continue
    return f"{text}; a device with {need / 2**30:.0f} GiB would fit"


def _more_of(setting: Setting, larger: Setting) -> str:
    last = larger.cluster.levels[-1]
    if len(setting.cluster.levels) > 1:
        return f"{last.name} = {last.fanout}"
    node = setting.cluster.levels[0]
    return f"{last.fanout} {node.name}s of {node.fanout}, cluster.levels = [{node.fanout}, {last.fanout}]"


def _with_more(setting: Setting, factor: int) -> Setting:
    """The setting with `factor` times as many of the outermost level, and a batch that divides over it.

    A cluster of one level is one machine: it gets no larger, there are more of it, joined by links like those inside.
    """
    *inner, last = setting.cluster.levels
    if inner:
        levels = (*inner, last.model_copy(update={"fanout": last.fanout * factor}))
    else:
        levels = (last, last.model_copy(update={"name": f"{last.name}s", "fanout": factor}))
    cluster = setting.cluster.model_copy(update={"levels": levels})
    sequences = -(-setting.sequences // cluster.ranks) * cluster.ranks
    return Setting(
        setting.spec, cluster, sequences, setting.tokens, setting.framework, setting.calibration, setting.compute_dtype
    )
