"""Which setting would have fitted, of a run that ran out of memory: asked of the planner's formula. No torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from thinwire.cluster.hardware import calibration_of
from thinwire.errors import PlanError
from thinwire.model.spec import ModelSpec
from thinwire.plan.partition import resolve_partition
from thinwire.plan.plan import Plan
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.framework import thinwire_with
from thinwire.predict.peak_memory import peak_memory
from thinwire.predict.placement import place
from thinwire.units import show_bytes

if TYPE_CHECKING:
    from thinwire.train.job import Job


def advice(job: "Job", needed_bytes: float, capacity_bytes: float) -> str:
    """The mildest change that fits, by the formula raised to what was seen to be needed: for the end of a sentence."""
    spec, plan = job.spec, job.plan
    if not isinstance(spec, ModelSpec) or capacity_bytes <= 0:
        return _any(plan)
    here = predicted_bytes(job, spec, plan)
    factor = max(1.0, needed_bytes / here)
    for settings, other in milder(plan):
        bytes_ = factor * predicted_bytes(job, spec, other)
        if bytes_ <= capacity_bytes:
            return f"{settings} would fit: {show_bytes(bytes_)} of {show_bytes(capacity_bytes)}"
    return f"no smaller micro-batch, recomputation or partition fits {show_bytes(capacity_bytes)}: take more ranks"


def _any(plan: Plan) -> str:
    """What needs less memory of any model, of what the run does not do already."""
    levels = plan.levels_in_group
    ways = ["a smaller batch.micro_batch"] if plan.micro_batch > 1 else []
    ways += ["plan.recompute = 'full'"] if plan.recompute != "full" else []
    ways += ["a partition cut further (zero2, zero3)"] if levels and min(plan.depths) < levels - 1 else []
    return f"{' or '.join(ways)} needs less" if ways else "take more ranks, or shorter batch.tokens"


def milder(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """(settings in words, the plan they make), those first that cost least time."""
    share, partitions = plan.micro_batch * plan.accumulate, [("", plan)]
    for name in ("zero1", "zero2", "zero3"):
        levels = plan.level_names if plan.sync is None else plan.level_names[: plan.levels_in_group]
        partition, _ = resolve_partition(name, levels)
        cut = plan.model_copy(update={"partition": partition})
        if any(new > old for new, old in zip(cut.depths, plan.depths, strict=True)):
            partitions.append((f"plan.partition = '{name}'", cut))
    sizes = [size for size in range(plan.micro_batch, 0, -1) if share % size == 0]
    for named, cut in partitions:
        for recompute in dict.fromkeys((plan.recompute, "full")):
            for size in sizes:
                words = [f"batch.micro_batch = {size}"] if size != plan.micro_batch else []
                words += [f"plan.recompute = '{recompute}'"] if recompute != plan.recompute else []
                words += [named] if named else []
                if words:
                    changed = {"micro_batch": size, "accumulate": share // size, "recompute": recompute}
                    yield " with ".join(words), cut.model_copy(update=changed)


def predicted_bytes(job: "Job", spec: ModelSpec, plan: Plan) -> float:
    """Of the fullest rank, by the planner's formula. Links' figures do not matter for it, but it wants some."""
    levels = tuple(
        level.model_copy(update={"bytes_per_s": level.bytes_per_s or 1e9, "latency_s": level.latency_s or 1e-5})
        for level in job.cluster.levels
    )
    cluster = job.cluster.model_copy(update={"levels": levels})
    calibration, batch = calibration_of(cluster), job.config.batch
    framework, dtype = thinwire_with(job.config.optimizer), plan.compute_dtype
    setting = Setting(spec, cluster, batch.sequences, batch.tokens, framework, calibration, dtype)
    candidate = Candidate.of_plan(plan, spec.layers)
    try:
        return peak_memory(setting, candidate, place(candidate, cluster, calibration)).total
    except PlanError:  # the axes do not divide: it cannot be advised
        return float("inf")
