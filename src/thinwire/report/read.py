"""A run folder as a report needs it: what was decided, and what every step said. Reads files only."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thinwire.cluster.cluster import Cluster
from thinwire.config import explain, read_document
from thinwire.errors import ConfigError
from thinwire.files.events import read_events
from thinwire.files.trace import Span, read_trace
from thinwire.plan.plan import Plan

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
        alike = [record for record in since[1:] if record["step"] > self.plan.wire.whole_steps]
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


class _Record(BaseModel):
    """What a report reads of a record; more may stand there."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    step: int = Field(ge=0)


Figure = float | Literal["nan", "inf", "-inf"]
"""As `events.jsonl` writes floats."""


class _Start(_Record):
    parameters: int = Field(ge=0)
    held: dict[str, float] = {}
    wire_predicted: dict[str, dict[str, float]] = {}


class _Step(_Record):
    loss: Figure | None
    """None of a step without a scored token."""
    tokens: int = Field(ge=0)
    step_s: float = Field(gt=0)
    tokens_per_s: float = Field(ge=0)
    mfu: Figure | None
    seconds: dict[str, float] = Field(min_length=1)
    wire: dict[str, dict[str, float]]


class _Eval(_Record):
    loss: Figure | None


def _checked(record: dict[str, Any], model: type[_Record]) -> dict[str, Any]:
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
