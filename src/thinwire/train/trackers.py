"""Where a run's curves are shown: TensorBoard, Weights & Biases, MLflow, behind one interface. Rank 0 only.

A tracker is a guest: one that fails while the run goes on is dropped with a warning; `events.jsonl` has everything.
"""

import importlib.util
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from thinwire.config import Frozen
from thinwire.errors import ConfigError
from thinwire.files.folders import write_atomic

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
TENSORBOARD = "tensorboard"
_ANSWER_S = 20
KEPT = "trackers.json"
"""In the run folder: the trackers' own names of this run, so that a resumed run goes on with the same curves."""


class TrackingConfig(Frozen):
    """`[tracking]`: where the curves go."""

    to: tuple[TrackerName, ...] = ("tensorboard",)
    """Any of `tensorboard`, `wandb` (thinwire[wandb]) and `mlflow` (thinwire[mlflow])."""
    project: str = Field(default="thinwire", min_length=1)
    """The project (Weights & Biases) or experiment (MLflow)."""
    mlflow_uri: str | None = None
    """A server or folder as MLflow names it; default: what MLflow itself is set to."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run folder; `wandb sync` sends it later."""

    def check(self) -> None:
        """Raises ConfigError if a library that is asked for is not installed."""
        for name in self.to:
            if name != "tensorboard" and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"tracking.to names {name!r}, which is not installed; pip install 'thinwire[{name}]', or leave it out"
                )


class Tracker(Protocol):
    """What the loop needs of one."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve."""

    def close(self) -> None:
        """Send what is waiting."""


class TensorBoard:
    """Event files in the run folder; points after `first_step` of an earlier start are hidden.

    Written here and not by a SummaryWriter, whose thread dies of a full disk with a traceback of its own.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        (folder / TENSORBOARD).mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest}"
        self._records = RecordWriter((folder / TENSORBOARD / name).open("wb"))
        self._write(step=first_step + 1, file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, values: Mapping[str, float], step: int) -> None:
        shown = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=shown))

    def close(self) -> None:
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, config: TrackingConfig, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project, name=folder.name, dir=str(folder), mode=config.wandb_mode, config=dict(settings),
            id=_kept(folder, "wandb"), resume="allow",
        )  # fmt: skip
        _keep(folder, "wandb", self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, on a tracking server or in a folder."""

    def __init__(self, folder: Path, config: TrackingConfig, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        _must_answer(config.mlflow_uri)
        self._metric, self._client = Metric, MlflowClient(tracking_uri=config.mlflow_uri)
        known = _kept(folder, "mlflow")
        if known is None:
            found = self._client.get_experiment_by_name(config.project)
            experiment = found.experiment_id if found else self._client.create_experiment(config.project)
            known = self._client.create_run(experiment, run_name=folder.name).info.run_id
            self._client.log_batch(known, params=[Param(name, str(value)) for name, value in flat(settings).items()])
            _keep(folder, "mlflow", known)
        self._id = known

    def log(self, values: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(n, v, now_ms, step) for n, v in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _must_answer(uri: str | None) -> None:
    """A server that is not there is noticed now: MLflow itself would try again for minutes. Raises OSError."""
    if uri is None or not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:  # an answer, if one that asks who we are
        return
    except OSError as error:
        raise OSError(f"{uri} does not answer ({getattr(error, 'reason', error)})") from None


def open_trackers(
    config: TrackingConfig, folder: Path, *, first_step: int, settings: Mapping[str, Any]
) -> dict[str, Tracker]:
    """Every tracker asked for, by name; `settings` is the resolved run file. Raises ConfigError if one cannot start."""
    config.check()
    made: dict[str, Tracker] = {}
    for name in config.to:
        try:
            if name == "tensorboard":
                made[name] = TensorBoard(folder, first_step=first_step)
            else:
                made[name] = (Wandb if name == "wandb" else Mlflow)(folder, config, settings)
        except Exception as error:
            raise ConfigError(
                f"tracking.to names {name!r}, which cannot start: {error}; mend it or leave it out"
            ) from None
    return made


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _kept(folder: Path, name: str) -> str | None:
    found = _all_kept(folder).get(name)
    return found if isinstance(found, str) else None


def _keep(folder: Path, name: str, identity: str) -> None:
    write_atomic(folder / KEPT, json.dumps({**_all_kept(folder), name: identity}) + "\n")


def _all_kept(folder: Path) -> dict[str, Any]:
    """Nothing if the file is no JSON object: the curves then begin anew."""
    try:
        found = json.loads((folder / KEPT).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
