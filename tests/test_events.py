"""The event log: valid JSON always, torn ends left out, later lines count."""

import json
from pathlib import Path

from thinwire.events import EventLog, read_events, steps


def test_records_survive_and_non_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1, loss=float("nan"), wire={"node": {"G-reduce": 8}}, row=[float("inf")])
    log.write("eval", step=1, loss=2.0)
    log.close()
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert next(read_events(tmp_path / "events.jsonl", "step"))["loss"] == "nan"


def test_a_torn_last_line_is_left_out_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"step","step":1,"loss":3}\n{"event":"step","step":1,"loss":2}\n{"event":"step","st')
    assert steps(path) == {1: {"event": "step", "step": 1, "loss": 2}}
