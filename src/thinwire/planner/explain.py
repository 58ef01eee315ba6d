"""The answer in words and tables, and as a document for programs."""

import math
from dataclasses import asdict, fields
from typing import Any

from thinwire.cluster.cluster import show_levels
from thinwire.planner.search import MOST_UNITS, Choice, Hopeful, Ranked, SearchResult, busy
from thinwire.planner.space import shape_of, show_axes, show_states, show_sync
from thinwire.predict.candidate import Setting
from thinwire.predict.causes import StepTime
from thinwire.predict.peak_memory import Memory
from thinwire.predict.planned import sent_bytes
from thinwire.units import show_bytes, show_count, show_seconds

TIME_NAMES = {
    "matmul_s": "matmuls", "memory_s": "element-wise work", "launch_s": "launching kernels", "tensor_s": "tensor axis",
    "context_s": "context axis", "data_s": "data axis, not hidden", "bubble_s": "waiting for other stages",
    "send_s": "sends between stages", "optimizer_s": "optimizer", "outer_s": "outer stalls",
    "hidden_s": "(hidden communication)",
}  # fmt: skip
MEMORY_NAMES = {
    "params": "parameters", "grads": "gradients", "optimizer": "optimizer states", "residual": "error feedback",
    "gathered": "unsharded units, gradients in flight", "activations": "activations", "live": "loss or live block",
    "outer": "outer states", "framework": "runtime",
}  # fmt: skip


def rests_on(setting: Setting) -> str:
    """One line on where the figures come from."""
    calibration, cluster = setting.calibration, setting.cluster
    links = ", ".join(f"{level.name} {level.origin}" for level in cluster.levels)
    return (
        f"rests on: links {links}; device {cluster.device.name} {cluster.device.origin}; efficiencies "
        f"{calibration.origin} ({calibration.source})"
    )


def mfu(setting: Setting, seconds: float) -> float:
    """Model FLOPs utilisation, attention's full square counted, recomputation not (arXiv 2204.02311, appendix B)."""
    assert setting.cluster.device.peak_flops_per_s
    flops = setting.spec.model_flops_per_token(setting.tokens) * setting.tokens * setting.sequences
    return flops / seconds / setting.cluster.ranks / setting.cluster.device.peak_flops_per_s


def report(answer: Choice, setting: Setting, *, top: int) -> list[str]:
    """Lines for a person."""
    best = answer.best
    spec, cluster = setting.spec, setting.cluster
    levels = show_levels(cluster.shape)
    lines = [
        f"{show_count(setting.parameters)} parameters on {cluster.ranks} {cluster.device.name} ({levels}), "
        f"{setting.sequences} x {setting.tokens} tokens per step, {spec.layers} blocks",
        rests_on(setting),
        "",
    ]
    every = answer.every_step.best[0]
    computes = f"{busy(every):.0%} of its {show_seconds(every.time.total)}"
    slow = f"synchronising every step, the best plan computes for {computes}; "
    if answer.outer is not None and answer.outer.best:
        lines += [slow + "plans whose outermost groups synchronise rarely come first, and train differently:"]
        lines += _table(answer.outer, setting, top)
        lines += ["", "synchronising every step:", *_table(answer.every_step, setting, min(top, 3))]
    else:
        if answer.outer is not None:
            groups = cluster.levels[-1].name
            lines += [
                slow
                + f"groups that synchronise rarely would help, but the model does not fit into one member of {groups!r}:"
            ]
        lines += _table(answer.every_step, setting, top)
    lines += ["", *_causes(best, setting), "", *_memory(best.memory, setting), "", *_traffic(best, setting)]
    return lines


Row = Ranked | Hopeful


def seconds_of(row: Row) -> float:
    """The simulated step, or what it takes at least."""
    return row.time.total if isinstance(row, Ranked) else row.least_s


def distinct(found: SearchResult, top: int) -> list[Row]:
    """The fastest of each shape, so that variants of one plan do not fill the table."""
    shapes: dict[tuple[object, ...], Row] = {}
    others: list[Row] = [*found.best[1:], *found.rest]
    for row in (*found.best[:1], *sorted(others, key=seconds_of)):
        shapes.setdefault(shape_of(row.candidate), row)
    return list(shapes.values())[:top]


def _table(found: SearchResult, setting: Setting, top: int) -> list[str]:
    rows = [("", "seconds", "MFU", "GiB", "axes", "mb", "recompute", "states (P; G; O) and codecs")]
    shown = distinct(found, top)
    for place, row in enumerate(shown, 1):
        candidate, seconds = row.candidate, seconds_of(row)
        mark = "" if candidate.runnable else "*"
        least, most = ("", "") if isinstance(row, Ranked) else ("> ", "< ")
        rows.append(
            (
                f"{place}{mark}",
                f"{least}{seconds:.4g}",
                f"{most}{mfu(setting, seconds):.1%}",
                f"{row.memory.total / 2**30:.1f}",
                show_axes(candidate, setting),
                str(candidate.micro_batch),
                candidate.recompute,
                show_states(candidate, setting),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sync = show_sync(shown[0].candidate)
    lines += [f"   {sync}"] if sync else []
    marked = sorted({what for row in shown for what in row.candidate.not_run_yet})
    return [*lines, *([f"* the trainer does not run {', '.join(marked)} yet"] if marked else []), _proof(found)]


def _proof(found: SearchResult) -> str:
    """How sure it is that plan 1 is the fastest."""
    looked = f"{found.simulated} of {found.fitting} plans that were looked at closely were simulated"
    if found.proven:
        return (
            f"no plan that fits is simulated to be faster than plan 1: {looked}, the bounds of all others lie above it"
        )
    return (
        f"another plan may be faster than plan 1, in {found.unseen_s:.4g} s at least: {looked}, which is the limit "
        f"({MOST_UNITS:,} micro-batches times blocks)"
    )


def _causes(best: Ranked, setting: Setting) -> list[str]:
    lines = [f"seconds of plan 1, {setting.sequences * setting.tokens / best.time.total:,.0f} tokens/s:"]
    for each in fields(StepTime):
        seconds = getattr(best.time, each.name)
        if seconds > 0.0005 * best.time.total:
            lines.append(f"  {TIME_NAMES[each.name]:<26} {seconds:9.4f} s  {seconds / best.time.total:6.1%}")
    return lines


def _memory(memory: Memory, setting: Setting) -> list[str]:
    low, high = memory.interval
    capacity = setting.cluster.device.memory_bytes
    assert capacity
    lines = [
        f"memory at stage {memory.stage}: {show_bytes(memory.total)} ({low / 2**30:.1f} to {high / 2**30:.1f} GiB) of "
        f"{show_bytes(capacity)}:"
    ]
    for name, text in MEMORY_NAMES.items():
        count = getattr(memory, name)
        if count > 0:
            lines.append(f"  {text:<26} {count / 2**30:9.2f} GiB")
    if memory.host > 0:
        lines.append(f"host memory: {show_bytes(memory.host)} per rank for outer states")
    return lines


def _traffic(best: Ranked, setting: Setting) -> list[str]:
    lines = ["a rank sends in a step:"]
    for level, purposes in sent_bytes(setting, best.candidate, best.axes).items():
        parts = ", ".join(f"{purpose} {show_bytes(count)}" for purpose, count in purposes.items())
        lines.append(f"  {level}: {parts}")
    return lines


def document(answer: Choice, setting: Setting, *, top: int) -> dict[str, Any]:
    """The answer for programs."""
    found = answer.outer if answer.outer is not None and answer.outer.best else answer.every_step
    return {
        "version": 1,
        "rests_on": {
            "calibration": setting.calibration.origin,
            "calibration_source": setting.calibration.source,
            "device": setting.cluster.device.origin,
            "levels": {level.name: level.origin for level in setting.cluster.levels},
        },
        "cores": found.cores,
        "bounded": found.fitting,
        "simulated": found.simulated,
        "proven": found.proven,
        "others_take_at_least_s": None if math.isinf(found.unseen_s) else found.unseen_s,
        "plans": [entry(row, setting) for row in distinct(found, top)],
    }


def entry(row: Row, setting: Setting) -> dict[str, Any]:
    """One candidate as plain values. Without `seconds` by cause it was not simulated, and takes `step_s` at least."""
    candidate = row.candidate
    low, high = row.memory.interval
    return {
        "step_s": seconds_of(row),
        "seconds": asdict(row.time) if isinstance(row, Ranked) else None,
        "mfu": mfu(setting, seconds_of(row)),
        "memory_bytes": row.memory.total,
        "memory_low_bytes": low,
        "memory_high_bytes": high,
        "memory": asdict(row.memory),
        "sent_bytes": sent_bytes(setting, candidate, row.axes),
        "candidate": asdict(candidate),
        "data": candidate.data(setting.cluster),
        "accumulate": candidate.accumulate(setting),
        "runnable": candidate.runnable,
        "not_run_yet": list(candidate.not_run_yet),
        "plan": candidate.to_plan(setting).model_dump(mode="json") if candidate.runnable else None,
    }
