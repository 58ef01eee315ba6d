"""What the study of outer synchronisation plans, keeps, and makes of its records."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import outer_study
import outer_table
import train_runs
from outer_study import BASE, KINDS, Book, Run

from thinwire.config import build
from thinwire.train.config import RunConfig


def record(kind: str, seed: int, loss: float, sent: float, *, groups: int = 2, inner_steps: int = 30) -> dict[str, Any]:
    h = 1 if kind == BASE else inner_steps
    curve = [{"tokens": 0, "sent_bytes": 0, "loss": 5.0}, {"tokens": 512, "sent_bytes": sent, "loss": loss}]
    return {
        "seed": seed, "groups": groups, "inner_steps": h, "kind": kind, "steps": 10, "seconds": 1.0, "parameters": 100,
        "curve": curve,
    }  # fmt: skip


RECORDS = [
    record(BASE, 1, 2.00, 4000), record(BASE, 2, 2.10, 4000),
    record("streaming fp32", 1, 2.00, 400), record("streaming fp32", 2, 2.00, 400),
    record("streaming e3m0", 1, 2.02, 50), record("streaming e3m0", 2, 2.00, 50),
]  # fmt: skip


def test_every_kind_is_planned_once_for_each_seed_groups_and_h_and_data_parallel_once_for_all_h() -> None:
    runs = list(outer_study.planned(outer_study.parse([])))
    every = 2 * 3 * (2 + 2 * (len(KINDS) - 2))
    assert len(runs) == len(set(runs)) == every - 2 * 3  # two groups have nobody to add up with
    assert [run.groups for run in runs] == sorted(run.groups for run in runs)


@pytest.mark.parametrize("run", list(outer_study.planned(outer_study.parse(["--seeds", "1"]))), ids=str)
def test_every_planned_run_is_a_valid_run_file_validated_at_the_end_of_rounds(run: Run, tmp_path: Path) -> None:
    chosen = outer_study.settings(run, outer_study.parse([]), tmp_path)
    tree: dict[str, Any] = {}
    for key, value in chosen.items():
        if key != "cluster.levels":
            *path, last = key.split(".")
            inner = tree
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = str(value) if isinstance(value, Path) else value
    config = build(RunConfig, tree, "run.toml")
    assert config.run.eval_every % run.inner_steps == 0
    assert config.run.steps % config.run.eval_every == 0
    if KINDS[run.kind]:
        assert config.plan.sync is not None
        summed = run.kind == outer_study.SUMMED
        levels = [("node", run.groups // 2), ("cluster", 2)] if summed else [("node", run.groups)]
        assert chosen["cluster.levels"] == str([fanout for _, fanout in levels])
        sync = config.plan.sync.resolve(levels)
        assert sync.summed == (run.groups // 2 if summed else 1)
        assert (sync.groups, sync.inner_steps, sync.kind) == (run.groups, run.inner_steps, KINDS[run.kind]["kind"])


def test_finished_runs_are_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pretend(run: Run, options: Any) -> dict[str, Any]:
        made.append(run)
        return record(run.kind, run.seed, 2.0, 100.0, inner_steps=run.inner_steps)

    monkeypatch.setattr(outer_study, "measure", pretend)
    words = ["outer_study.py", "--out", str(tmp_path), "--groups", "2", "--inner-steps", "30", "--seeds", "1", "2"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*words, "--at-most", "3"])
        outer_study.main()
    assert len(made) == len(set(made)) == 6
    lines = (tmp_path / "outer_study.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6
    assert not (tmp_path / "outer_study.md").exists()
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "60"])
    with pytest.raises(SystemExit, match=r"holds runs with steps = .*another --out"):
        outer_study.main()


def test_a_line_of_the_events_is_summed_up_to_each_validation(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"event": "run_start", "parameters": 7},
        {"event": "eval", "step": 0, "loss": 5.0},
        {"event": "step", "step": 1, "tokens": 512, "wire": {"node": {"grads": 100, "control": 8}, "x": {"y": 9}}},
        {"event": "step", "step": 2, "tokens": 512, "wire": {}},
        {"event": "eval", "step": 2, "loss": 4.0},
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = outer_study.read(path, 1024, "node")
    assert read["parameters"] == 7
    assert read["curve"][-1] == {"tokens": 2048, "sent_bytes": 108, "loss": 4.0}


def test_ratios_are_between_runs_of_the_same_seed() -> None:
    rows = {row["kind"]: row for row in outer_table.summary(RECORDS, BASE)}
    coded = rows["streaming e3m0"]
    assert coded["against_base"] == pytest.approx({"1": 0.01, "2": 2.0 / 2.1 - 1})
    assert coded["against_fp32"] == pytest.approx({"1": 0.01, "2": 0.0})
    assert coded["bytes_a_step"] == 5.0
    assert coded["bytes_of_base"] == pytest.approx(50 / 4000)
    assert rows["streaming fp32"]["against_fp32"] == {}


@pytest.mark.parametrize(
    ("losses", "word"),
    [((2.001, 2.002), "met"), ((2.05, 2.06), "missed"), ((2.00, 2.06), "missed, but within the noise of so few runs")],
)
def test_a_target_is_met_or_missed_by_the_mean_and_noise_is_said(losses: tuple[float, float], word: str) -> None:
    records = [record(BASE, seed, 2.0, 4000) for seed in (1, 2)]
    records += [record("streaming e3m0", seed, loss, 50) for seed, loss in enumerate(losses, 1)]
    (line,) = outer_table.verdicts(outer_table.summary(records, BASE))
    assert "at most 1.0% above data-parallel" in line
    assert line.endswith(f"over 2 runs, {word}.")


def test_e3m0_is_held_against_its_own_fp32_at_every_size_and_over_all() -> None:
    records = [
        *RECORDS,
        record("streaming fp32", 1, 2.0, 400, groups=4),
        record("streaming e3m0", 1, 2.0, 50, groups=4),
    ]
    lines = outer_table.verdicts(outer_table.summary(records, BASE))
    assert ["its own fp32" in line for line in lines] == [False, True, True, True]
    assert "over 3 runs" in lines[-1]


def test_the_least_bytes_of_an_exact_method_are_those_of_an_all_reduce() -> None:
    assert outer_table.least_exact_mb(RECORDS, 2) == pytest.approx(4 * 100 * 10 / 1e6)
    assert outer_table.least_exact_mb(RECORDS, 4) == pytest.approx(6 * 100 * 10 / 1e6)


def test_the_report_has_every_row_and_needs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    options = ["--out", str(tmp_path), "--groups", "2", "--inner-steps", "30", "--seeds", "1", "2", "--at-most", "0"]
    monkeypatch.setattr(sys, "argv", ["outer_study.py", *options])
    setting = {key: getattr(outer_study.parse(options), key) for key in outer_study.SETTING}
    book = Book(tmp_path / "outer_study.jsonl", setting)
    for one in RECORDS:
        book.add(one)
    outer_study.main()
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".json", ".md", ".png", ".html"}
    table = (tmp_path / "outer_study.md").read_text()
    assert all(kind in table for kind in (BASE, "streaming fp32", "streaming e3m0"))
    assert "--at-most" not in table
    left = len(list(outer_study.planned(outer_study.parse(options)))) - len(RECORDS)
    assert f"{left} of the {left + len(RECORDS)} runs of the command below are not made yet" in table


def test_a_run_that_was_stopped_is_no_finished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`thinwire train` ends with 0 then, so that schedulers do not take a stop for a failure."""
    monkeypatch.setattr(
        train_runs, "PROGRAM", [sys.executable, "-c", "print('stopped after step 3; the same command')"]
    )
    with pytest.raises(SystemExit, match="stopped after step 3"):
        train_runs.train("run.toml", {})
