"""Prediction beside measurement of our own runs: ranks, joins and verdicts, and a real run whose bytes are foreseen."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import predict_own_runs
from own_runs import Measured, Predicted, Row, kendall_tau, lines, summary, told_apart

from runs import make_corpus
from thinwire.cluster.cluster import Cluster, Device, Level
from thinwire.config import dump_toml

SENT = {"node": {"G-reduce": 100, "G-gather": 100}}


def row(
    plan: str, predicted_s: float, *measured_s: float, sent: dict[str, dict[str, int]] = SENT, held: int = 40
) -> Row:
    states = {"params": 0.0, "grads": 10.0, "optimizer": 30.0}
    told = Predicted(predicted_s, {}, SENT, states, 100.0)
    seen = tuple(Measured((s,), {}, sent, {"params": 0, "grads": 10, "optimizer": held - 10}) for s in measured_s)
    return Row(plan, (told,) * len(seen), seen, peak=100.0)


def test_kendalls_tau_is_that_of_the_book() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [40, 30, 20, 10]) == -1.0
    # Kendall 1938, section 3: the orders 1..10 and 4 7 2 10 3 6 8 1 5 9 score 5 of 45.
    assert kendall_tau(list(range(10)), [4, 7, 2, 10, 3, 6, 8, 1, 5, 9]) == pytest.approx(5 / 45)
    assert kendall_tau([1, 2], [3, 3]) == 0.0  # a tie orders nothing


def test_pairs_that_change_places_between_repeats_are_not_told_apart() -> None:
    rows = [row("a", 1.0, 1.0, 1.2), row("b", 0.9, 1.3, 1.1), row("c", 2.0, 2.0, 2.1)]
    assert len(told_apart(rows)) == 2
    found = summary(rows)
    assert found.tau_apart == 1.0 and found.tau == pytest.approx(1 / 3) and (found.pairs_apart, found.pairs) == (2, 3)


def test_a_miss_is_said_to_be_one() -> None:
    other = {"node": {"G-reduce": 100, "G-gather": 101}}
    found = summary([row("a", 1.2, 1.0), row("b", 1.0, 2.0, sent=other), row("c", 3.0, 3.0, held=30)])
    assert found.met == {
        "median error within 10%": False, "tau at least 0.8": False, "bytes equal": False, "memory within 8%": False,
    }  # fmt: skip
    assert lines(found)[1].count("MISSED") == 4


def test_control_messages_and_noughts_are_no_difference() -> None:
    assert row("a", 1.0, 1.0, sent={"node": {**SENT["node"], "control": 16}, "cluster": {"control": 8}}).bytes_equal
    assert not row("a", 1.0, 1.0, sent={"node": {"G-reduce": 100}}).bytes_equal


def test_each_repeat_is_held_against_its_own_probe() -> None:
    """A machine that has become twice as fast between the repeats is no error."""
    slow, fast = row("a", 2.0, 2.0), row("a", 1.0, 1.1)
    both = Row("a", slow.predicted + fast.predicted, slow.measured + fast.measured)
    assert both.error == pytest.approx((1.0 + 1.0 / 1.1) / 2 - 1)
    assert both.predicted_s == 1.5 and both.peak_error is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "plan", "sequences"),
    [
        ("2 ranks", "zero3", 4),
        ("2 ranks", "zero3, micro-batches of 1", 2),
        ("2 ranks", "zero1, recompute", 4),
        ("2 ranks", "zero1, int4 gradients", 4),
        ("2 x 2 ranks", "auto, int4 gradients", 8),
    ],
)
def test_bytes_and_memory_of_a_real_run_are_foreseen(tmp_path: Path, world: str, plan: str, sequences: int) -> None:
    foresee(tmp_path, world, plan, sequences)


@pytest.mark.slow
def test_what_error_feedback_carries_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 of every sum that enters the coded hop, and as much again of the step under way."""
    settings = ["plan.partition=zero1", "plan.compression={grads={node='int4'}, error_feedback=true}"]
    monkeypatch.setattr(predict_own_runs, "plans_of", lambda world: {"feedback": settings})
    foresee(tmp_path, "2 ranks", "feedback", 4)


def foresee(tmp_path: Path, world: str, plan: str, sequences: int) -> None:
    """Run the plan on made-up figures of this host, whose ranks read each other's memory; bytes and memory have to be
    those that were predicted."""
    sizes = predict_own_runs.WORLDS[world].levels
    figures = {"bytes_per_s": 1e9, "latency_s": 1e-4, "behind": 0.0}
    levels = tuple(Level(name=name, fanout=fanout, **figures) for name, fanout in sizes)
    device = Device(peak_flops_per_s=5e10, memory_bytes=2**33, memory_bytes_per_s=1e10)
    work = tmp_path / "0"
    (work / "0").mkdir(parents=True)
    (work / "0" / "cluster.toml").write_text(dump_toml(Cluster(device=device, levels=levels)))
    options = Namespace(
        model="llama-1m", corpus=make_corpus(tmp_path / "data"), sequences=sequences, tokens=64, micro_batch=4,
        plans=[plan], repeats=1, seconds=0.0, end_s=float("inf"), longest_s=1e9, keep=True, quick=True, peaks=True,
    )  # fmt: skip
    rows, rests = predict_own_runs.measure(world, options, work)
    assert [each.plan for each in rows] == [plan] and "given" in rests
    assert rows[0].bytes_equal and rows[0].predicted[0].sent, (rows[0].predicted, rows[0].measured)
    assert abs(rows[0].states_error) < 0.01 and rows[0].measured_s > 0
    assert rows[0].peak_error is not None and abs(rows[0].peak_error) < 0.05, rows[0]
