"""What `plan` and `simulate` share: a run file without the need for data, and the setting that it means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinwire.checkpoint.config import CheckpointConfig
from thinwire.cluster.cluster import Cluster, ClusterConfig
from thinwire.cluster.presets import calibration_of
from thinwire.config import Frozen, load
from thinwire.cost.candidate import Setting, Sync
from thinwire.data.config import DataConfig
from thinwire.errors import ConfigError
from thinwire.model.config import ModelConfig
from thinwire.plan import Plan, PlanConfig, read_plan
from thinwire.planner.space import Space
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
    return Task(file, setting, _fixed(file, cluster), _sync(file, setting))


def _vocabulary(file: PlanningFile) -> int | None:
    """The tokenizer's, if the corpus is there already."""
    from thinwire.data.corpus import Corpus, exists

    return Corpus.open(file.data).vocab_size if file.data is not None and exists(file.data) else None


def _fixed(file: PlanningFile, cluster: Cluster) -> dict[str, object]:
    """Fields of a candidate that the file decides; `partition = "auto"` decides nothing."""
    fixed: dict[str, object] = {}
    given = file.plan.model_fields_set
    if file.plan.file is not None:
        return _of_document(file, cluster)
    if file.batch.micro_batch is not None:
        fixed["micro_batch"] = file.batch.micro_batch
    if "recompute" in given:
        fixed["recompute"] = file.plan.recompute
    if "keep_gathered" in given:
        fixed["keep_gathered"] = file.plan.keep_gathered
    if file.plan.partition != "auto":
        plan = file.plan.resolve(cluster, micro_batch=1, accumulate=1)
        fixed["depths"] = plan.depths
    return fixed


def _sync(file: PlanningFile, setting: Setting) -> Sync | None:
    cluster = setting.cluster
    if file.plan.file is not None:
        rounds = _document(file, cluster).sync
    else:
        levels = [(level.name, level.fanout) for level in cluster.levels]
        rounds = None if file.plan.sync is None else file.plan.sync.resolve(levels)
    return None if rounds is None else Sync.of(rounds, cluster.index(rounds.level), setting.spec.layers)


def _document(file: PlanningFile, cluster: Cluster) -> Plan:
    """The plan that the file names. Raises PlanError if it is for other levels or another batch."""
    assert file.plan.file is not None
    return read_plan(file.plan.file, cluster, sequences=file.batch.sequences // cluster.ranks)


def _of_document(file: PlanningFile, cluster: Cluster) -> dict[str, object]:
    """Every field of a candidate that a plan document decides."""
    plan = _document(file, cluster)
    names = cluster.level_names
    return {
        "depths": plan.depths,
        "keep_gathered": plan.partition.keep_gathered,
        "recompute": plan.recompute,
        "micro_batch": plan.micro_batch,
        "weights": tuple(plan.wire.weights.get(name) for name in names) if plan.wire.weights else (),
        "grads": tuple(plan.wire.grads.get(name) for name in names) if plan.wire.grads else (),
    }


def space_of(found: Task, *, runnable: bool, codecs: str) -> Space:
    """The space that the options leave open. Raises ConfigError for an unknown word."""
    if codecs not in ("none", "bf16", "all"):
        raise ConfigError(f"--codecs {codecs!r} is unknown; there are none, bf16 and all")
    return Space(runnable=runnable, codecs=codecs, fixed=found.fixed, sync=found.sync)  # type: ignore[arg-type]
