"""Rounds on a slow link: what the delay hides, and what it does not."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from labs import need_lab
from thinwire.lab.config import LabConfig
from thinwire.lab.lab import Lab
from thinwire.predict.candidate import CandidateSync
from thinwire.predict.outer_cost import stall_s

PROGRAM = str(Path(__file__).parents[1] / "lab_rounds.py")
RATE = 2e6  # bytes per second: half a second for a fragment
INNER_STEPS, FRAGMENTS, PERIODS = 10, 2, 2
HEADERS = 1514 / 1448  # a packet of these links, over what it carries


@pytest.fixture(scope="module")
def measured() -> dict[int, dict[str, Any]]:
    """By delay, of two groups whose steps sleep for 0.15 s."""
    need_lab()
    setting = {"inner_steps": INNER_STEPS, "periods": PERIODS, "sleep_s": 0.15, "delays": [0, 2, 5]}
    with Lab(LabConfig(hosts=2, host_rate=RATE)) as lab:
        outcome = lab.run([sys.executable, PROGRAM, json.dumps(setting)], timeout_s=200)
        assert outcome.ok, "\n".join(end.tail() for end in outcome.ends)
        told = json.loads(outcome.ends[0].tail().splitlines()[-1])
    return {int(delay): of_delay for delay, of_delay in told.items()}


@pytest.mark.parametrize("delay", [0, 2, 5])
def test_i15_the_time_of_h_steps_is_the_formulas(measured: dict[int, dict[str, Any]], delay: int) -> None:
    """Steps, and the stall of what the delay does not hide, from this run's own steps; within 10 %."""
    seen = measured[delay]
    step_s = statistics.median(seen["seconds"])
    sync = CandidateSync(level=0, inner_steps=INNER_STEPS, fragments=FRAGMENTS, overlap_steps=delay, codec="fp32")
    stall = FRAGMENTS * stall_s(HEADERS * seen["sent_bytes"] / RATE, step_s, sync)
    assert sum(seen["seconds"]) / PERIODS == pytest.approx(INNER_STEPS * step_s + stall, rel=0.1)


def test_i15_without_a_delay_training_stands_still_for_the_time_on_the_wire(
    measured: dict[int, dict[str, Any]],
) -> None:
    at_once, behind = measured[0], measured[5]
    least_s = 0.95 * at_once["sent_bytes"] / RATE
    assert len(at_once["stalls"]) == len(behind["stalls"]) == FRAGMENTS * PERIODS
    assert all(stall >= least_s for stall in at_once["stalls"])
    assert sum(behind["stalls"]) < 0.1 * sum(at_once["stalls"])
