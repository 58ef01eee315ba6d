"""Trackers: what is logged arrives, a resumed run goes on with its own curves, one that fails does not end the run."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from labs import eventually
from thinwire.errors import ConfigError
from thinwire.events import read_events
from thinwire.train.telemetry import Telemetry
from thinwire.train.trackers import TrackingConfig, flat, open_trackers


class _Broken:
    def log(self, values: Mapping[str, float], step: int) -> None:
        raise OSError("the server is gone")

    def close(self) -> None:
        raise AssertionError("a tracker that was dropped is left alone")


def test_a_tracker_that_fails_is_dropped_with_a_warning(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, {"mlflow": _Broken()}, total_steps=2, first_step=0, log_every=1)
    for step in (1, 2):
        telemetry.event("eval", step=step, loss=1.0)
    telemetry.close()
    faults = [event["message"] for event in read_events(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert len(faults) == 1
    assert "mlflow takes no more records from step 1 on: the server is gone" in faults[0]


def test_settings_are_flattened() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'wandb', which is not installed; pip install 'thinwire\[wandb\]'"):
        TrackingConfig(to=("wandb",)).check()


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_offline_into_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = TrackingConfig(to=("wandb",), wandb_mode="offline")
    tracker = open_trackers(config, tmp_path, first_step=0, settings={"run": {"steps": 2}})["wandb"]
    tracker.log({"train/loss": 3.0}, 1)
    tracker.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert eventually(lambda: b"train/loss" in written.read_bytes())  # by a process of its own
