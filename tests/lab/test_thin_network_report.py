"""What the slow-link benchmark makes of its measurements: rows, limits, causes, files."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import driver
import thin_network

OPTIONS = argparse.Namespace(
    sides=["no network", "torch DDP", "broken"], rates=[100.0], sequences=2, tokens=128, accumulate=1, model="llama-11m",
    loss_steps=4, inner_steps=2,
)  # fmt: skip


def phase(rate: float | None, step_s: float, sent: float, **more: float) -> dict[str, Any]:
    return {"rate": rate, "steps": 2, "step_s": step_s, "sent_bytes": sent, **more}


SEEN = {
    "no network": {"phases": [phase(None, 1.0, 0, loss=3.0), phase(100.0, 1.0, 0)], "error": None},
    "torch DDP": {"phases": [phase(None, 2.0, 60e6, loss=2.5), phase(100.0, 8.0, 64e6)], "error": None},
    "broken": {"phases": [], "error": "TypeError: not here"},
}


def test_shares_are_of_the_speed_without_a_network() -> None:
    rows = {row["side"]: row for row in thin_network.summary(SEEN, OPTIONS)}
    slow = rows["torch DDP"]["rates"]["100 Mbit/s"]
    assert slow["share"] == 1 / 8
    assert slow["tokens_per_s"] == 2 * 128 * 4 / 8
    assert rows["torch DDP"]["loss"] == 2.5
    assert rows["torch DDP"]["sent_mb"] == 62.0


def test_the_limits_are_four_bytes_a_parameter_and_the_speed_of_compute() -> None:
    bound = thin_network.limits(OPTIONS, SEEN)
    assert bound["no_network_tokens_per_s"] == 1024
    assert bound["exact_tokens_per_s"]["100 Mbit/s"] == pytest.approx(1024 / (bound["least_exact_mb"] * 8 / 100))


def test_without_a_network_row_there_is_no_share() -> None:
    seen = {**SEEN, "no network": {"phases": [], "error": None}}
    row = thin_network.summary(seen, OPTIONS)[1]
    assert row["rates"]["100 Mbit/s"]["share"] is None
    assert thin_network.limits(OPTIONS, seen)["no_network_tokens_per_s"] is None


def test_a_side_that_failed_shows_why_in_its_row() -> None:
    row = thin_network.summary(SEEN, OPTIONS)[2]
    cells = thin_network.cells(row, ["100 Mbit/s"], thin_network.limits(OPTIONS, SEEN))
    assert "TypeError: not here" in cells[0]


def test_the_cause_is_the_exception_and_not_its_echo_on_other_ranks(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    logs[0].write_text("step 1\n[rank0]: TypeError: no such hook\nsome farewell\n")
    logs[1].write_text("RuntimeError: Connection closed by peer [10.0.0.1]\n")
    assert driver.cause(logs) == "TypeError: no such hook"
    logs[0].write_text("killed while saying this: nothing\n")
    logs[1].write_text("")
    assert driver.cause(logs) == "killed while saying this: nothing"


def test_a_report_is_written_with_its_command_and_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = argparse.Namespace(**vars(OPTIONS), out=tmp_path)
    thin_network.write(thin_network.report_of(SEEN, options), options)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png", ".html"}
    table = (tmp_path / "thin_network.md").read_text()
    assert all(side in table for side in OPTIONS.sides)
    assert "benchmarks/thin_network.py" in json.loads((tmp_path / "thin_network.json").read_text())["command"]
