"""`thinwire report` on real runs: what it reads and predicts, and the page in a real browser."""

import itertools
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from browser import PROGRAM, Browser
from runs import make_corpus, thinwire, write_run
from thinwire.errors import ConfigError
from thinwire.report.figures import course_of_a_step, last_step, merged, said, thinned, wire_rows
from thinwire.report.read import Predicted, predict, read_run, read_runs

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium here: `make packages` installs it")
DEVICE = {
    "name": "known", "kind": "cpu",
    "peak_flops_per_s": "50 GFLOP/s", "memory_bytes": "4 GiB", "memory_bytes_per_s": "10 GB/s",
}  # fmt: skip
LEVEL = {"name": "node", "fanout": 2, "bytes_per_s": "8 Gbit/s", "latency_s": "50 us"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`alone`: one rank, no figures of the cluster. `pair`: two ranks, states cut, every figure given."""
    folder = tmp_path_factory.mktemp("report")
    corpus = make_corpus(folder)
    write_run(folder, corpus, "alone", run={"steps": 6, "eval_every": 3})
    write_run(
        folder, corpus, "pair", run={"steps": 6, "eval_every": 3}, plan={"partition": "zero3"},
        cluster={"device": DEVICE, "levels": [LEVEL]},
    )  # fmt: skip
    for name in ("alone", "pair"):
        done = thinwire("train", folder / f"{name}.toml")
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in ("alone", "pair")}


def test_a_run_is_read_as_its_events_say(runs: dict[str, Path]) -> None:
    run = read_run(runs["pair"], "pair")
    assert [record["step"] for record in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in run.evals] == [0, 3, 6]
    assert run.along("tokens")[-1] == sum(record["tokens"] for record in run.steps)
    assert run.along("seconds")[-1] == pytest.approx(sum(record["step_s"] for record in run.steps))
    assert run.along("bytes")[-1] == sum(sum(record["wire"]["node"].values()) for record in run.steps)
    assert sum(run.seconds.values()) == pytest.approx(fmean(record["step_s"] for record in run.latest), abs=1e-4)


def test_predicted_bytes_stand_beside_equal_measured_ones(runs: dict[str, Path]) -> None:
    rows = {purpose: (told, sent) for _, purpose, told, sent in wire_rows(read_run(runs["pair"], "pair"))}
    assert {"P-gather", "G-reduce"} <= set(rows)
    assert all(told == sent for told, sent in rows.values() if told is not None)


def test_a_step_and_its_states_are_predicted_where_every_figure_is_known(runs: dict[str, Path]) -> None:
    run = read_run(runs["pair"], "pair")
    predicted = predict(run)
    assert isinstance(predicted, Predicted), predicted
    assert sum(said(predicted).values()) == pytest.approx(predicted.time.total)
    assert set(said(predicted)) <= set(merged(run.seconds))
    assert predicted.memory.optimizer == pytest.approx(run.start["held"]["optimizer"], rel=0.1)
    assert any("node given" in line for line in predicted.advice)


def test_a_missing_figure_is_named_instead_of_a_prediction(runs: dict[str, Path]) -> None:
    said_instead = predict(read_run(runs["alone"], "alone"))
    assert isinstance(said_instead, str) and "has no peak_flops_per_s" in said_instead


def test_a_resumed_step_counts_once_and_a_torn_line_not_at_all(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["alone"], tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    again = next(json.loads(line) for line in events.read_text().splitlines() if '"step":4,"loss"' in line)
    events.write_text(events.read_text() + json.dumps(again | {"loss": "nan"}) + '\n{"event":"st')
    run = read_run(tmp_path / "run", "run")
    assert len(run.steps) == 6 and run.steps[3]["loss"] == "nan"


def test_the_trace_is_what_rank_0_did(runs: dict[str, Path]) -> None:
    run = read_run(runs["pair"], "pair")
    whole = {span.name: span.end_s - span.start_s for span in run.trace if span.lane == "steps"}
    assert list(whole) == ["step 2", "step 3", "step 4"], "the first step of a start warms up"
    for record in run.steps[1:4]:
        assert whole[f"step {record['step']}"] == pytest.approx(record["step_s"], abs=1e-4)
    step = last_step(run.trace)
    length = whole["step 4"]
    assert all(0 <= span.start_s <= span.end_s <= length + 1e-9 for span in step)
    compute = [span for span in step if span.lane == "compute"]
    assert [span.name for span in compute if span.name in ("forward", "backward", "optimizer")] == (
        ["forward", "backward"] * run.plan.accumulate + ["optimizer"]
    )
    lanes = {lane: [span for span in step if span.lane == lane] for lane in {span.lane for span in step}}
    assert {"compute", "node all_gather", "node reduce_scatter"} <= set(lanes)
    for spans in lanes.values():
        assert all(before.end_s <= after.start_s + 1e-9 for before, after in itertools.pairwise(spans))
    assert {span.name.split()[0] for span in lanes["node all_gather"]} == {"gather"}


def test_a_run_without_a_trace_has_no_timeline_and_a_damaged_one_is_named(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["alone"], tmp_path / "run")
    assert course_of_a_step(read_run(runs["alone"], "alone"), "no figures") is not None
    (tmp_path / "run" / "trace.json").unlink()
    assert course_of_a_step(read_run(tmp_path / "run", "run"), "no figures") is None
    (tmp_path / "run" / "trace.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"trace\.json is no trace of thinwire"):
        read_run(tmp_path / "run", "run")


def test_long_curves_keep_their_mean() -> None:
    xs, ys = thinned([(float(i), float(i % 2)) for i in range(6000)])
    assert len(xs) == 1500 and xs[-1] == 5999 and ys == [0.5] * 1500
    assert thinned([(1.0, 2.0)]) == ([1.0], [2.0])


def test_runs_of_the_same_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "pair"
    shutil.copytree(runs["pair"], other)
    assert [run.name for run in read_runs([runs["pair"], other])] == [str(runs["pair"]), str(other)]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere"], "no run folder"),
        (["{pair}", "{pair}"], "twice"),
        (["{pair}", "-o", "nowhere/report.html"], "cannot be written"),
        (["{pair}", "--cluster", "nowhere.toml"], "does not exist"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(
    runs: dict[str, Path], tmp_path: Path, arguments: list[str], word: str
) -> None:
    done = thinwire("report", *(each.format(**runs) for each in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_step_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["alone"], tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(True) if '"event":"step"' not in line))
    done = thinwire("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert done.returncode == 2 and "no finished step" in done.stderr and not (tmp_path / "r.html").exists()


@pytest.fixture(scope="module")
def written(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    done = thinwire("report", runs["alone"], runs["pair"], "-o", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


DRAWN = """[...document.querySelectorAll('.figure')].map(f => ({
  id: f.id, traces: (f.data || []).map(t => t.x.length && t.y.filter(y => y !== null).length),
  marks: f.querySelectorAll('.scatterlayer path, .barlayer path').length, width: f.getBoundingClientRect().width }))"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_the_page_draws_every_figure_without_a_network_or_a_complaint(
    written: Path, browser: Browser, width: int, dark: bool
) -> None:
    browser.open(written, width=width, height=844, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [written.as_uri()]
    figures = browser.evaluate(DRAWN)
    assert {each["id"].split("-")[2] for each in figures} == {"loss", "time", "course", "timeline", "wire", "memory"}
    for figure in figures:
        assert figure["traces"] and all(figure["traces"]), figure
        assert figure["marks"] > 0 and 250 < figure["width"] <= width, figure
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    ink = browser.evaluate("getComputedStyle(document.querySelector('.figure text')).fill")
    assert ink == ("rgb(230, 233, 238)" if dark else "rgb(27, 36, 48)")


@needs_browser
def test_an_error_in_a_page_is_heard(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "bad.html").write_text("<script>nothing.here()</script>")
    browser.open(tmp_path / "bad.html", width=800, height=600, dark=False)
    assert any("nothing is not defined" in each for each in browser.complaints())
