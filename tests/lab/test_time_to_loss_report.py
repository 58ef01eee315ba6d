"""What the benchmark of time to a loss makes of its measurements: ratios, limits, files."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import time_to_loss

OPTIONS = argparse.Namespace(sides=["thinwire auto", "FSDP2"], rate=100.0, steps=40, every=20, model="llama-11m")


def run_of(side: str, seed: int, *looks: tuple[int, float, float, float], error: str | None = None) -> dict[str, Any]:
    told = [
        {"steps": steps, "seconds": seconds, "sent_bytes": 1e6 * sent, "loss": loss}
        for steps, seconds, sent, loss in looks
    ]
    return {"side": side, "seed": seed, "looks": told, "error": error, "reached": error is None and bool(told)}


SEEN = [
    run_of("no network", 0, (20, 10.0, 0.0, 3.1)),
    run_of("torch DDP", 0, (20, 120.0, 1300.0, 3.0), (40, 240.0, 2600.0, 2.5)),
    run_of("torch DDP", 1, (20, 120.0, 1300.0, 3.0), (40, 240.0, 2600.0, 2.6)),
    run_of("thinwire auto", 0, (20, 80.0, 860.0, 2.9), (40, 160.0, 1720.0, 2.5)),
    run_of("thinwire auto", 1, (20, 60.0, 860.0, 2.6)),
    run_of("FSDP2", 0, error="TypeError: not here"),
]


def test_ratios_are_to_ddp_with_the_same_seed() -> None:
    name, steps, seconds, of_seconds, sent, of_sent = time_to_loss.cells("thinwire auto", SEEN)
    assert (name, steps, seconds, sent) == ("thinwire auto", "30", "110", "1290")
    assert float(of_seconds) == pytest.approx((160 / 240 + 60 / 240) / 2, abs=1e-3)
    assert float(of_sent) == pytest.approx((1720 / 2600 + 860 / 2600) / 2, abs=1e-3)


def test_a_side_that_failed_or_has_not_run_says_so() -> None:
    assert time_to_loss.cells("FSDP2", SEEN)[1] == "not reached: TypeError: not here"
    assert time_to_loss.cells("thinwire ddp", SEEN)[1] == "not measured"


def test_the_limits_are_the_speed_of_compute_and_four_bytes_a_parameter() -> None:
    bound = time_to_loss.limits(SEEN, OPTIONS)
    assert bound["no_network_s"] == 20.0
    assert bound["exact_mb"] == pytest.approx(40 * 42.88, rel=1e-3)
    assert bound["exact_s"] == pytest.approx(bound["exact_mb"] * 8 / 100)
    assert time_to_loss.limits(SEEN[1:], OPTIONS)["no_network_s"] is None


def test_a_report_is_written_with_its_command_and_every_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    time_to_loss.write(SEEN, argparse.Namespace(**vars(OPTIONS), out=tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png", ".html"}
    table = (tmp_path / "time_to_loss.md").read_text()
    assert all(side in table for side in ("torch DDP", *OPTIONS.sides))
    assert "benchmarks/time_to_loss.py" in json.loads((tmp_path / "time_to_loss.json").read_text())["command"]
