"""The answer in words and tables, and as a document for programs."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from thinwire.cluster.cluster import show_levels
from thinwire.planner.choose import Choice, busy
from thinwire.planner.search import Ranked
from thinwire.planner.sensitivity import SHARES, Flip, Needed, shape_of
from thinwire.planner.space import show_axes, show_states, show_sync
from thinwire.predict.candidate import Setting
from thinwire.predict.peak_memory import Memory
from thinwire.predict.planned import sent_bytes
from thinwire.predict.step import StepTime
from thinwire.units import show_bytes, show_count, show_rate, show_seconds

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
        lines += _table(answer.outer.best, setting, top)
        lines += ["", "synchronising every step:", *_table(answer.every_step.best, setting, min(top, 3))]
    else:
        if answer.outer is not None:
            groups = cluster.levels[-1].name
            lines += [
                slow
                + f"groups that synchronise rarely would help, but the model does not fit into one member of {groups!r}:"
            ]
        lines += _table(answer.every_step.best, setting, top)
    lines += ["", *_causes(best, setting), "", *_memory(best.memory, setting), "", *_traffic(best, setting)]
    return lines


def distinct(best: Sequence[Ranked], top: int) -> list[Ranked]:
    """The fastest of each shape, so that variants of one plan do not fill the table."""
    found: dict[tuple[object, ...], Ranked] = {}
    for ranked in best:
        found.setdefault(shape_of(ranked.candidate), ranked)
    return list(found.values())[:top]


def _table(best: Sequence[Ranked], setting: Setting, top: int) -> list[str]:
    rows = [("", "seconds", "simulated", "MFU", "GiB", "axes", "mb", "recompute", "states (P; G; O) and codecs")]
    for place, ranked in enumerate(distinct(best, top), 1):
        candidate = ranked.candidate
        mark = "" if candidate.runnable else "*"
        rows.append(
            (
                f"{place}{mark}",
                f"{ranked.time.total:.4g}",
                f"{ranked.simulated_s:.4g}" if ranked.simulated_s else "",
                f"{mfu(setting, ranked.time.total):.1%}",
                f"{ranked.memory.total / 2**30:.1f}",
                show_axes(candidate, setting),
                str(candidate.micro_batch),
                candidate.recompute,
                show_states(candidate, setting),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    marked = sorted({what for ranked in best for what in ranked.candidate.not_run_yet})
    sync = show_sync(best[0].candidate)
    lines += [f"   {sync}"] if sync else []
    return lines + ([f"* the trainer does not run {', '.join(marked)} yet"] if marked else [])


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


def show_needed(rows: Sequence[Needed], setting: Setting) -> list[str]:
    """Rates for shares of compute, as a table."""
    if not rows:
        return []
    level = setting.cluster.levels[-1].name
    head = f"rate of a {level} link for compute to be" + "".join(f"{share:>13.0%}" for share in SHARES)
    lines = [head]
    for row in rows:
        cells = "".join(f"{show_rate(rate) if rate else 'never':>13}" for rate in row.bytes_per_s)
        lines.append(f"  {row.scheme:<{len(head) - 13 * len(SHARES) - 2}}{cells}")
    if any(rate is None for row in rows for rate in row.bytes_per_s):
        lines.append("  never: latency, or causes that this link has no part in, already take more")
    return lines


def show_flips(flips: Sequence[Flip], setting: Setting) -> list[str]:
    """Where another plan becomes the best."""
    if not flips:
        return ["the best plan stays the best when any one level is four times slower or faster"]
    lines = []
    for flip in flips:
        now = setting.cluster.levels[setting.cluster.index(flip.level)].bytes_per_s
        assert now
        other = flip.other.candidate
        lines.append(
            f"at {show_rate(flip.bytes_per_s)} on {flip.level} (now {show_rate(now)}) the best becomes "
            f"{show_axes(other, setting)} {other.recompute} recompute, {show_states(other, setting)}"
        )
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
        "costed": found.costed,
        "plans": [entry(ranked, setting) for ranked in distinct(found.best, top)],
    }


def entry(ranked: Ranked, setting: Setting) -> dict[str, Any]:
    """One ranked candidate as plain values."""
    candidate = ranked.candidate
    low, high = ranked.memory.interval
    return {
        "step_s": ranked.time.total,
        "simulated_step_s": ranked.simulated_s,
        "seconds": asdict(ranked.time),
        "mfu": mfu(setting, ranked.time.total),
        "memory_bytes": ranked.memory.total,
        "memory_low_bytes": low,
        "memory_high_bytes": high,
        "memory": asdict(ranked.memory),
        "sent_bytes": sent_bytes(setting, candidate, ranked.axes),
        "candidate": asdict(candidate),
        "data": candidate.data(setting.cluster),
        "accumulate": candidate.accumulate(setting),
        "runnable": candidate.runnable,
        "not_run_yet": list(candidate.not_run_yet),
        "plan": candidate.to_plan(setting).model_dump(mode="json") if candidate.runnable else None,
    }
