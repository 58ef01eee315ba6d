"""The trace of a run's first steps: which steps, from which start, and what happens if it cannot be written."""

from pathlib import Path

import pytest

from runs import make_corpus, thinwire, write_run
from thinwire.comm.ledger import Entry
from thinwire.files.events import read_events
from thinwire.files.trace import Span, read_trace
from thinwire.train.clock import Lap, Tracer


def _entry(queued_s: float, finished_s: float, kind: str = "all_gather", sent: int = 1024) -> Entry:
    return Entry("node", kind, "P-refresh", 2048, sent, "int8", queued_s, queued_s, finished_s)


def _steps(spans: list[Span]) -> list[str]:
    return [span.name for span in spans if span.lane == "steps"]


def _record(tracer: Tracer, number: int, *entries: Entry) -> None:
    tracer.step(number, [Lap("forward", number, number + 0.5), Lap("comm", number + 0.5, number + 1.0)], entries)


def test_what_a_step_issued_and_the_next_one_awaited_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    tracer = Tracer(path, first_step=10, count=2)
    late = _entry(13.9, 0.0)
    _record(tracer, 11, _entry(11.1, 11.2))
    _record(tracer, 12, _entry(12.1, 12.4), _entry(12.2, 12.3), _entry(12.2, 12.6, "reduce_scatter"))
    _record(tracer, 13, late, _entry(13.0, 13.1, sent=0))
    assert not path.exists()
    late.finished_s = 14.2
    _record(tracer, 14, _entry(14.1, 14.3))
    spans = read_trace(path)
    assert _steps(spans) == ["step 12", "step 13"]
    assert [(span.name, span.start_s) for span in spans if span.lane == "compute"] == [("forward", 0), ("forward", 1)]
    wire = [
        (span.lane, span.name, round(span.start_s, 6), round(span.end_s, 6)) for span in spans if "node" in span.lane
    ]
    assert wire == [
        ("node all_gather", "refresh 1 KiB int8", 0.1, 0.4),
        ("node all_gather", "refresh 1 KiB int8", 0.3, 0.3),
        ("node reduce_scatter", "refresh 1 KiB int8", 0.2, 0.6),
        ("node all_gather", "refresh 1 KiB int8", 1.9, 2.2),
    ]
    path.unlink()
    _record(tracer, 15)
    tracer.close()
    assert not path.exists(), "written once"


def test_a_short_run_writes_what_there_was(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path / "trace.json", first_step=0, count=5)
    _record(tracer, 1)
    tracer.close()
    assert not (tmp_path / "trace.json").exists()
    tracer = Tracer(tmp_path / "trace.json", first_step=0, count=5)
    _record(tracer, 1)
    _record(tracer, 2)
    tracer.close()
    assert _steps(read_trace(tmp_path / "trace.json")) == ["step 2"]


def test_a_trace_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, make_corpus(tmp_path), run={"steps": 4}, checkpoint={"every_steps": 0})
    (tmp_path / "run" / "logs").mkdir(parents=True)
    assert thinwire("train", run_file, "--set", "run.steps=3").returncode == 0
    (tmp_path / "run" / "trace.json").unlink()
    (tmp_path / "run" / "trace.json").mkdir()
    done = thinwire("train", run_file, "--set", "run.steps=7")
    assert done.returncode == 0, done.stderr
    told = [record["message"] for record in read_events(tmp_path / "run" / "events.jsonl", "fault")]
    assert len(told) == 1 and told[0].startswith("trace.json cannot be written: Is a directory")


def test_another_file_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"traceEvents": [{"ph": "X"}]}')
    with pytest.raises(ValueError, match=r"x\.json is no trace of thinwire"):
        read_trace(tmp_path / "x.json")
