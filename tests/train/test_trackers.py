"""Trackers: what is logged arrives, a resumed run goes on with its own curves, one that fails does not end the run."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from labs import eventually
from thinwire.errors import ConfigError
from thinwire.files.events import read_events
from thinwire.train.progress import Telemetry
from thinwire.train.trackers import TrackingConfig, flat, open_trackers


class _Broken:
    def log(self, values: Mapping[str, float], step: int) -> None:
        raise OSError("the server is gone")

    def close(self) -> None:
        raise AssertionError("a tracker that was dropped is left alone")


def test_a_tracker_that_fails_is_dropped_with_a_warning(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, {"mlflow": _Broken()}, total_steps=2, first_step=0, log_every=1, no_loss="none")
    for step in (1, 2):
        telemetry.event("eval", step=step, loss=1.0)
    telemetry.close()
    faults = [event["message"] for event in read_events(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert len(faults) == 1
    assert "mlflow takes no more records from step 1 on: the server is gone" in faults[0]


def test_tensorboard_reads_what_was_logged_and_hides_what_a_resumed_run_did_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 5), (3, 7)):
        tracker = open_trackers(TrackingConfig(), tmp_path, first_step=first, settings={})["tensorboard"]
        for step in range(first + 1, last + 1):
            tracker.log({"train/loss": step / 10 + first, "train/lr": 0.5}, step)
        tracker.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(read.Tags()["scalars"]) == ["train/loss", "train/lr"]
    assert [(one.step, round(one.value, 3)) for one in read.Scalars("train/loss")] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (4, 3.4), (5, 3.5), (6, 3.6), (7, 3.7),
    ]  # fmt: skip


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
