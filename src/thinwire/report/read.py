"""A run as its folder tells it, and what the planner says of it: seconds by cause, memory, how far it is from the best plan.

A prediction needs figures of the device and of every level: from the run's own cluster, or from a cluster file such as
`thinwire probe` writes. Where something is missing the report says what, in the words of the error.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thinwire.cluster.cluster import Cluster, show_levels
from thinwire.cluster.hardware import calibration_of
from thinwire.config import build, explain, read_document, read_toml
from thinwire.data.corpus import Corpus, DataConfig, exists
from thinwire.errors import ConfigError, ThinwireError
from thinwire.files.events import read_events
from thinwire.files.trace import Span, read_trace
from thinwire.model.config import ModelConfig
from thinwire.model.spec import ModelSpec
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.plan.plan import Plan
from thinwire.planner.choose import choose
from thinwire.planner.explain import report, rests_on
from thinwire.planner.search import step_time
from thinwire.planner.space import Codecs, Space
from thinwire.predict.candidate import Candidate, Setting, thinwire_with
from thinwire.predict.causes import StepTime
from thinwire.predict.peak_memory import Memory, peak_memory
from thinwire.predict.placement import check_device, place
from thinwire.predict.simulate import simulate_step

Wire = dict[str, dict[str, float]]
"""level -> purpose -> bytes that rank 0 sends in one step."""


@dataclass(frozen=True)
class Run:
    """One run. `steps` are in order, the later record of a step that was done twice."""

    name: str
    folder: Path
    plan: Plan
    cluster: Cluster
    start: dict[str, Any]
    """The newest `run_start`: what was held and predicted is said of the plan that it started with."""
    steps: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    trace: tuple[Span, ...] = ()
    """What rank 0 did in a few steps, if the run recorded it."""

    @cached_property
    def latest(self) -> tuple[dict[str, Any], ...]:
        """Steps since the newest start, left out if there are others: its first (it warms up), and those that send more."""
        since = [record for record in self.steps if record["step"] > self.start["step"]] or list(self.steps)
        alike = [record for record in since[1:] if record["step"] > self.plan.compression.whole_steps]
        return tuple(alike or since[1:] or since)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Mean seconds of a step by cause."""
        causes = dict.fromkeys(cause for record in self.latest for cause in record["seconds"])
        return {cause: fmean(record["seconds"].get(cause, 0.0) for record in self.latest) for cause in causes}

    @cached_property
    def wire(self) -> Wire:
        """Mean bytes of a step."""
        sums: Wire = {}
        for record in self.latest:
            for level, purposes in record["wire"].items():
                of_level = sums.setdefault(level, {})
                for purpose, count in purposes.items():
                    of_level[purpose] = of_level.get(purpose, 0.0) + count / len(self.latest)
        return sums

    @property
    def emulated(self) -> bool:
        """Whether ranks slept in place of computing: there are no losses."""
        return bool(self.start.get("emulated"))

    @property
    def thin_level(self) -> str | None:
        """The outermost level over which anything was sent; None for a run of one rank."""
        sent = {level for record in self.steps for level, purposes in record["wire"].items() if sum(purposes.values())}
        return next((level for level in reversed(self.cluster.level_names) if level in sent), None)

    def along(self, axis: str) -> list[float]:
        """Where each step ends along `steps`, `tokens`, `seconds` or `bytes` (of rank 0 over the outermost level)."""
        if axis == "steps":
            return [record["step"] for record in self.steps]
        return list(itertools.accumulate(self._of(record, axis) for record in self.steps))

    def _of(self, record: dict[str, Any], axis: str) -> float:
        if axis == "bytes":
            return float(sum(record["wire"].get(self.thin_level, {}).values()))
        if axis == "tokens":
            return float(record.get("processed_tokens", record["tokens"]))  # older runs know the scored ones alone
        return float(record["step_s"])


class _EventRecord(BaseModel):
    """What a report reads of a record; more may stand there."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    step: int = Field(ge=0)


EventFloat = float | Literal["nan", "inf", "-inf"]
"""As `events.jsonl` writes floats."""


class _Start(_EventRecord):
    parameters: int = Field(ge=0)
    held: dict[str, float] = {}
    wire_predicted: dict[str, dict[str, float]] = {}


class _Step(_EventRecord):
    loss: EventFloat | None
    """None of a step without a scored token."""
    tokens: int = Field(ge=0)
    step_s: float = Field(gt=0)
    tokens_per_s: float = Field(ge=0)
    mfu: EventFloat | None
    seconds: dict[str, float] = Field(min_length=1)
    wire: dict[str, dict[str, float]]


class _Eval(_EventRecord):
    loss: EventFloat | None


def _checked(record: dict[str, Any], model: type[_EventRecord]) -> dict[str, Any]:
    """Raises ValueError with the field that lacks or is wrong."""
    try:
        model.model_validate(record)
    except ValidationError as error:
        raise ValueError(f"of a {record['event']} record {explain(error)}; remove that line, or train on") from None
    return record


def number(value: Any) -> float | None:
    """A figure of an event; None where it was not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run, named so that no two have the same name. Raises ConfigError."""
    runs = [read_run(folder, folder.name) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    runs = [read_run(folder, str(folder)) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError("the same run folder is given twice; give each once")
    return runs


def read_run(folder: Path, name: str) -> Run:
    """One run folder. Raises ConfigError if it is none, or if it has no finished step yet."""
    try:
        return _read(folder, name)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{error.filename or folder} cannot be read: {reason}; make it readable") from None


def _read(folder: Path, name: str) -> Run:
    events = folder / "events.jsonl"
    for path in (events, folder / "plan.json", folder / "cluster.json"):
        if not path.is_file():
            raise ConfigError(
                f"{folder} is no run folder: there is no {path.name}; give folders that `thinwire train` made"
            )
    way_out = "train on with this version, or leave this run out"
    plan = read_document(folder / "plan.json", Plan, what="plan of version 1", way_out=way_out)
    cluster = read_document(folder / "cluster.json", Cluster, what="cluster of version 1", way_out=way_out)
    try:
        records = list(read_events(events))
        found: dict[str, list[dict[str, Any]]] = {
            kind: [_checked(record, model) for record in records if record["event"] == kind]
            for kind, model in (("run_start", _Start), ("step", _Step), ("eval", _Eval))
        }
    except ValueError as error:
        raise ConfigError(f"{events} is damaged: {error}") from None
    start = found["run_start"][-1] if found["run_start"] else None
    steps = {record["step"]: record for record in found["step"]}
    evals = {record["step"]: record for record in found["eval"]}
    if start is None or not steps:
        raise ConfigError(f"{folder} has no finished step yet; train first")
    ordered = tuple(steps[step] for step in sorted(steps))
    held_out = tuple(evals[step] for step in sorted(evals))
    return Run(name, folder, plan, cluster, start, ordered, held_out, _trace(folder / "trace.json"))


def _trace(path: Path) -> tuple[Span, ...]:
    """Raises ConfigError if the file is there and no trace."""
    try:
        return tuple(read_trace(path)) if path.is_file() else ()
    except ValueError as error:
        raise ConfigError(f"{error}; remove it, or train on") from None


@dataclass(frozen=True)
class Predicted:
    """Of one run: its own plan's step and memory on rank 0's stage, and what the planner would choose."""

    time: StepTime
    memory: Memory
    rests_on: str
    advice: tuple[str, ...]
    """Lines: the best runnable plans for this model, batch and cluster."""
    spans: tuple[Span, ...]
    """The simulated step, on the rank that stands for all."""


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
    if cluster.shape != run.plan.levels:
        raise ConfigError(f"the cluster has other levels than the run {run.name} ({show_levels(run.plan.levels)})")

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
    codecs: Codecs = "all" if run.plan.compression.weights or run.plan.compression.grads else "none"
    answer = choose(setting, Space(runnable=True, codecs=codecs), keep=20, outer="never")
    return tuple(report(answer, setting, top=5))
