"""What the planner says of a run that was made: seconds by cause, memory, and how far its plan is from the best.

A prediction needs figures of the device and of every level: from the run's own cluster, or from a cluster file such as
`thinwire probe` writes. Where something is missing the report says what, in the words of the error.
"""

from dataclasses import dataclass

from thinwire.cluster.cluster import Cluster
from thinwire.cluster.hardware import calibration_of
from thinwire.config import build, read_toml
from thinwire.data.config import DataConfig
from thinwire.data.corpus import Corpus, exists
from thinwire.errors import ConfigError, ThinwireError
from thinwire.files.trace import Span
from thinwire.model.config import ModelConfig
from thinwire.model.spec import ModelSpec
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.planner.choose import choose
from thinwire.planner.explain import report, rests_on
from thinwire.planner.space import Codecs, Space
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.framework import thinwire_with
from thinwire.predict.peak_memory import Memory, peak_memory
from thinwire.predict.placement import place
from thinwire.predict.simulate import simulate_step
from thinwire.predict.step import StepTime, step_time
from thinwire.report.read import Run


@dataclass(frozen=True)
class Predicted:
    """Of one run: its own plan's step and memory on rank 0's stage, and what the planner would choose."""

    time: StepTime
    memory: Memory
    rests_on: str
    advice: tuple[str, ...]
    """Lines: the best runnable plans for this model, batch and cluster."""
    spans: tuple[Span, ...]
    """The step as the simulator plays it, on the rank that stands for all."""


def predict(run: Run, cluster: Cluster | None = None) -> Predicted | str:
    """The prediction, on `cluster` instead of the run's own if given; or one sentence on why there is none."""
    try:
        setting = setting_of(run, cluster or run.cluster)
        candidate = Candidate.of_plan(run.plan, setting.spec.layers)
        axes = place(candidate, setting.cluster, setting.calibration)
        return Predicted(
            step_time(setting, candidate, axes),
            peak_memory(setting, candidate, axes),
            rests_on(setting),
            advice(setting, run),
            simulate_step(setting, candidate, axes).spans,
        )
    except ThinwireError as error:
        return str(error)


def setting_of(run: Run, cluster: Cluster) -> Setting:
    """What was given to the run. Raises ConfigError if it cannot be known, or if planning lacks a figure."""
    if [(level.name, level.fanout) for level in cluster.levels] != [(n, k) for n, k in run.plan.levels]:
        levels = " x ".join(f"{name}={fanout}" for name, fanout in run.plan.levels)
        raise ConfigError(f"the cluster has other levels than the run {run.name} ({levels})")
    from thinwire.predict.placement import check_device

    check_device(cluster.device)
    tree = read_toml(run.folder / "run.toml")
    spec = _spec(run, build(ModelConfig, tree.get("model", {}), "run.toml: model"), tree.get("data"))
    tokens = tree.get("batch", {}).get("tokens", 256)
    sequences = run.plan.micro_batch * run.plan.accumulate * cluster.ranks
    framework = thinwire_with(build(OptimizerConfig, tree.get("optimizer", {}), "run.toml: optimizer"))
    return Setting(spec, cluster, sequences, tokens, framework, calibration_of(cluster), run.plan.compute_dtype)


def _spec(run: Run, model: ModelConfig, data: object) -> ModelSpec:
    if model.hf is not None or model.init is not None:
        raise ConfigError("a model that started from imported weights is not predicted")
    vocabulary = None
    if isinstance(data, dict):
        config = build(DataConfig, data, "run.toml: data")
        vocabulary = Corpus.open(config).vocab_size if exists(config) else None
    spec = model.resolve(vocabulary)
    if spec.parameters != run.start["parameters"]:
        raise ConfigError(
            f"the run trained {run.start['parameters']:,} parameters, its run file now says {spec.parameters:,}: its "
            f"corpus is not where it was"
        )
    return spec


def advice(setting: Setting, run: Run) -> tuple[str, ...]:
    """The best plans that the trainer runs, with weights and gradients as they are unless the run codes them."""
    codecs: Codecs = "all" if run.plan.wire.weights or run.plan.wire.grads else "none"
    answer = choose(setting, Space(runnable=True, codecs=codecs), keep=20, outer="never")
    return tuple(report(answer, setting, top=5))
