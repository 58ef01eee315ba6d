"""What the planner writes, the trainer runs unchanged; what does not belong together is one sentence."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from own_runs import clean

from runs import make_corpus, thinwire, write_run
from thinwire.files.events import steps
from thinwire.plan.compression import Compression
from thinwire.plan.plan import Plan
from thinwire.train.folder import EVENTS_FILE

CLUSTER = {
    "device": {
        "name": "own", "kind": "cpu", "peak_flops_per_s": 1e11, "memory_bytes": 2**32, "memory_bytes_per_s": 1e10,
    },
    "levels": [{"name": "node", "fanout": 2, "bytes_per_s": 1e9, "latency_s": 1e-4}],
}  # fmt: skip


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    return write_run(folder, make_corpus(folder / "data"), cluster=CLUSTER, run={"steps": 3, "sample_tokens": 0})


def test_the_written_plan_is_run_unchanged(run_file: Path) -> None:
    out = run_file.parent / "best.json"
    planned = thinwire("plan", run_file, "--runnable", "-o", out)
    assert planned.returncode == 0, planned.stderr
    assert "links node given" in planned.stdout
    trained = thinwire("train", run_file, "--plan", out)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((run_file.parent / "run" / "plan.json").read_text()) == json.loads(out.read_text())
    again = thinwire("simulate", run_file, "--set", f"plan.file={out}", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["step_s"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"levels": [["node", 4]]}, "is for the levels node=4, the cluster has node=2"),
        ({"micro_batch": 64}, "sequences per step, batch.sequences gives it"),
        ({"version": 2}, "is no plan of version 1"),
    ],
)
def test_a_plan_for_something_else_is_one_sentence(run_file: Path, change: dict[str, object], says: str) -> None:
    out = run_file.parent / "other.json"
    assert thinwire("plan", run_file, "--runnable", "-o", out).returncode == 0
    out.write_text(json.dumps({**json.loads(out.read_text()), **change}))
    done = thinwire("train", run_file, "--plan", out, "--fresh")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_plan_and_two_sources_of_decisions_are_refused(run_file: Path) -> None:
    missing = thinwire("train", run_file, "--plan", run_file.parent / "none.json")
    assert (missing.returncode, "cannot be read" in missing.stderr) == (2, True)
    both = thinwire("train", run_file, "--plan", run_file.parent / "none.json", "--set", "plan.partition=zero1")
    assert (both.returncode, "leave out plan.partition" in both.stderr) == (2, True)


def test_rounds_that_the_planner_chose_are_run_unchanged(tmp_path: Path) -> None:
    (node,) = CLUSTER["levels"]
    sites = {**CLUSTER, "levels": [{**node, "fanout": 1}, {**node, "name": "site", "bytes_per_s": 1e5}]}
    file = write_run(tmp_path, make_corpus(tmp_path / "data"), cluster=sites, run={"steps": 20, "sample_tokens": 0})
    out = tmp_path / "rounds.json"
    planned = thinwire("plan", file, "--runnable", "-o", out)
    assert planned.returncode == 0, planned.stderr
    assert "whose outermost groups synchronise rarely come first" in planned.stdout
    sync = json.loads(out.read_text())["sync"]
    assert (sync["level"], sync["groups"], sync["codec"]) == ("site", 2, "e3m0")
    assert f"groups synchronise every {sync['inner_steps']} steps" in planned.stdout
    trained = thinwire("train", file, "--plan", out)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == json.loads(out.read_text())
    again = thinwire("plan", file, "--set", f"plan.file={out}")
    assert again.returncode == 0, again.stderr
    assert f"groups synchronise every {sync['inner_steps']} steps" in again.stdout


def test_rounds_that_the_run_file_decides_are_planned_with_and_written(run_file: Path) -> None:
    out = run_file.parent / "decided.json"
    words = ["--set", "plan.sync.inner_steps=40", "--set", "plan.sync.kind=co2"]
    planned = thinwire("plan", run_file, "--runnable", "-o", out, *words)
    assert planned.returncode == 0, planned.stderr
    assert "groups synchronise every 40 steps" in planned.stdout
    sync = json.loads(out.read_text())["sync"]
    assert (sync["kind"], sync["inner_steps"], sync["late"]) == ("co2", 40, True)


@pytest.mark.parametrize(
    "compression", [{"weights": {"node": "int4"}, "grads": {"node": "e3m0"}, "block": 64, "rounding": "stochastic"}, {}]
)
def test_codecs_that_the_run_file_decides_are_kept(tmp_path: Path, compression: dict[str, Any]) -> None:
    """Also those that no search would choose, on levels where it would choose none, to the bytes of a block's scales."""
    corpus, out = make_corpus(tmp_path / "data"), tmp_path / "plan.json"
    file = write_run(
        tmp_path, corpus, cluster=CLUSTER, plan={"compression": compression}, run={"steps": 3, "sample_tokens": 0}
    )
    planned = thinwire("plan", file, "--runnable", "-o", out, "--json")
    assert planned.returncode == 0, planned.stderr
    assert Plan.model_validate_json(out.read_text()).compression == Compression.model_validate(compression)
    bare = write_run(tmp_path, corpus, "bare", cluster=CLUSTER, run={"steps": 3, "sample_tokens": 0})
    trained = thinwire("train", bare, "--plan", out)
    assert trained.returncode == 0, trained.stderr
    (best, *_) = json.loads(planned.stdout)["plans"]
    assert clean(best["sent_bytes"]) == clean(steps(tmp_path / "bare" / EVENTS_FILE)[2]["wire"]) != {}


def test_gradients_of_low_rank_are_not_planned_and_that_is_said(tmp_path: Path) -> None:
    (node,) = CLUSTER["levels"]
    cluster = {**CLUSTER, "levels": [node, {**node, "name": "cluster"}]}
    compression = {"grads": {"cluster": "lowrank"}}
    file = write_run(tmp_path, make_corpus(tmp_path / "data"), cluster=cluster, plan={"compression": compression})
    done = thinwire("plan", file)
    assert done.returncode == 2 and "low rank" in done.stderr, done.stderr
