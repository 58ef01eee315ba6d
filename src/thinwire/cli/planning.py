"""What `plan` and `simulate` share: a run file without the need for data, and the setting that it means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinwire.checkpoint.config import CheckpointConfig
from thinwire.cluster.cluster import Cluster, ClusterConfig
from thinwire.cluster.presets import calibration_of
from thinwire.config import Frozen, load
from thinwire.cost.candidate import Candidate, Setting, Sync
from thinwire.data.config import DataConfig
from thinwire.errors import ConfigError
from thinwire.model.config import ModelConfig
from thinwire.plan import Plan, PlanConfig, read_plan
from thinwire.planner.space import WIRE, Space
from thinwire.train.config import BatchConfig, OptimizerConfig, RunSection, ScheduleConfig


class PlanningFile(Frozen):
    """A run file; planning needs only `[model]`, `[batch]` and `[cluster]`, and heeds what `[plan]` decides."""

    model: ModelConfig = ModelConfig()
    data: DataConfig | None = None
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    cluster: ClusterConfig = ClusterConfig()
    plan: PlanConfig = PlanConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunSection = RunSection()


@dataclass(frozen=True)
class Task:
    """A planning file, resolved."""

    file: PlanningFile
    setting: Setting
    fixed: dict[str, object]
    """What `[plan]` and `[batch]` decide."""
    sync: Sync | None
    """Rounds of worker groups, if `[plan]` decides them."""


def task(run_file: Path, settings: Sequence[str]) -> Task:
    """Read and resolve. Raises ConfigError, DataError or PlanError with one sentence."""
    file = load(PlanningFile, run_file, settings)
    cluster = file.cluster.resolve(run_file.parent)
    spec = file.model.resolve(_vocabulary(file))
    if file.batch.tokens > spec.max_tokens:
        raise ConfigError(
            f"{run_file}: batch.tokens = {file.batch.tokens} is longer than the model's {spec.max_tokens} positions; "
            f"lower batch.tokens or set model.max_tokens = {file.batch.tokens}"
        )
    given = file.plan.model_fields_set
    dtype = (
        file.plan.compute_dtype if "compute_dtype" in given else ("fp32" if cluster.device.kind == "cpu" else "bf16")
    )
    setting = Setting(
        spec,
        cluster,
        file.batch.sequences,
        file.batch.tokens,
        calibration=calibration_of(cluster),
        compute_dtype=dtype,
    )
    plan = _decided(file, cluster)
    point = Candidate.of_plan(plan, spec.layers)
    return Task(file, setting, {name: getattr(point, name) for name in _names(file, plan)}, point.sync)


def _vocabulary(file: PlanningFile) -> int | None:
    """The tokenizer's, if the corpus is there already."""
    from thinwire.data.corpus import Corpus, exists

    return Corpus.open(file.data).vocab_size if file.data is not None and exists(file.data) else None


def _decided(file: PlanningFile, cluster: Cluster) -> Plan:
    """The plan that the file names, or that its `[plan]` is so far. Raises PlanError if it does not fit."""
    if file.plan.file is not None:
        return read_plan(file.plan.file, cluster, sequences=file.batch.sequences // cluster.ranks)
    return file.plan.resolve(cluster, micro_batch=file.batch.micro_batch or 1, accumulate=1)


def _names(file: PlanningFile, plan: Plan) -> list[str]:
    """Fields of a candidate that the file decides; `partition = "auto"` decides nothing."""
    if file.plan.file is not None:
        return ["depths", "keep_gathered", "recompute", "micro_batch", *WIRE]
    given = file.plan.model_fields_set
    found = ["micro_batch"] if file.batch.micro_batch is not None else []
    found += [name for name in ("recompute", "keep_gathered") if name in given]
    found += ["depths"] if file.plan.partition != "auto" else []
    return found + ([*WIRE] if "wire" in given or plan.wire.weights or plan.wire.grads else [])


def space_of(found: Task, *, runnable: bool, codecs: str) -> Space:
    """The space that the options leave open. Raises ConfigError for an unknown word."""
    if codecs not in ("none", "bf16", "all"):
        raise ConfigError(f"--codecs {codecs!r} is unknown; there are none, bf16 and all")
    return Space(runnable=runnable, codecs=codecs, fixed=found.fixed, sync=found.sync)  # type: ignore[arg-type]
