"""What a run logs to MLflow is there, in a folder and on MLflow's own server; a resumed run goes on with its curves."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import eventually
from runs import make_corpus, thinwire, write_run
from thinwire.files.events import read_events, steps
from thinwire.train.trackers import TrackingConfig, open_trackers

pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a tracking server with a database of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: _answers(url) or process.poll() is not None, 180)
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(params=["folder", pytest.param("server", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "server":
        return str(request.getfixturevalue("server"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def test_a_second_start_goes_on_with_the_curves_of_the_first(uri: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = TrackingConfig(to=("mlflow",), mlflow_uri=uri, project="p")
    for step in (1, 2):
        tracker = open_trackers(config, tmp_path, first_step=step, settings={"run": {"steps": 2}})["mlflow"]
        tracker.log({"train/loss": 3.0 / step}, step)
        tracker.close()
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.data.params == {"run.steps": "2"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 3.0), (2, 1.5)]


@pytest.mark.slow
def test_a_run_s_losses_are_on_the_server(server: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    tracking = {"to": ["mlflow"], "mlflow_uri": server, "project": "of a run"}
    path = write_run(tmp_path, make_corpus(tmp_path), run={"steps": 4}, tracking=tracking)
    done = thinwire("train", path)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=server)
    (run,) = client.search_runs([client.get_experiment_by_name("of a run").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert json.loads(run.data.params["model.hidden"]) == 32
    losses = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}
    events = steps(tmp_path / "run" / "events.jsonl")
    assert losses == {number: pytest.approx(record["loss"]) for number, record in events.items()}
    assert len(losses) == 4
    assert not [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "fault"]


def test_a_server_that_is_not_there_is_one_sentence_at_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    path = write_run(tmp_path, make_corpus(tmp_path), tracking={"to": ["mlflow"], "mlflow_uri": url})
    done = thinwire("train", path)
    assert done.returncode == 2, done.stderr
    assert f"cannot start: {url} does not answer (" in done.stderr.strip().splitlines()[-1]
