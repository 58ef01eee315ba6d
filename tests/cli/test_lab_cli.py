"""`thinwire lab` on the command line: wrong input, outcomes, a training run with a fault at a step."""

import json
from pathlib import Path
from typing import Any

import pytest

from labs import need_lab, peer
from runs import make_corpus, thinwire, write_run
from thinwire.files.events import steps

TWO_BY_TWO = "hosts = 2\nranks_per_host = 2\n"


def lab_file(folder: Path, text: str = TWO_BY_TWO) -> Path:
    path = folder / "lab.toml"
    path.write_text(text)
    return path


def test_every_verb_shows_a_worked_example() -> None:
    for verb in ("run", "show", "clean"):
        assert "Example: thinwire lab" in " ".join(thinwire("lab", verb, "--help").stdout.split()), verb


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("hosts = 0", ["--", "true"], "1 to 254 hosts"),
        ("hosts = 2\nhost_rate = 0", ["--", "true"], "0 is no rate"),
        ("hosts = 2\nhost_rate = '40 Gbit/s'", ["--", "true"], "outside what the kernel shapes"),
        ("hosts = 200\nranks_per_host = 100000", ["--", "true"], "ranks fit, or lower memory_per_rank"),
        ("hosts = 2\ncongestion = 'smoke'", ["--", "true"], "'smoke' is not in this kernel"),
        ("hosts =", ["--", "true"], "not valid TOML"),
        (TWO_BY_TWO, [], "give a command after"),
        (TWO_BY_TWO, ["--train", "run.toml", "--", "true"], "one of the two"),
        (TWO_BY_TWO, ["--train", "nowhere.toml"], "nowhere.toml does not exist"),
        (TWO_BY_TWO, ["--set", "run.steps=1", "--", "true"], "--set and --fresh belong to --train"),
        (TWO_BY_TWO, ["--lab", "hosts=300", "--", "true"], "not 300"),
    ],
)
def test_wrong_input_gets_one_sentence_and_status_2(tmp_path: Path, text: str, arguments: list[str], says: str) -> None:
    need_lab()
    done = thinwire("lab", "run", lab_file(tmp_path, text), *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lab.toml"]


def test_show_prints_every_command_and_builds_nothing(tmp_path: Path) -> None:
    path = lab_file(tmp_path, "hosts = 2\nhost_rate = '20 Mbit/s'")
    assert "host1  10.88.0.2  20 Mbit/s  rank 1" in thinwire("lab", "show", path).stdout
    shown = json.loads(thinwire("lab", "show", path, "--json").stdout)
    assert shown["lab"]["hosts"] == 2
    assert sum("tbf" in command["argv"] for command in shown["commands"]) == 4


def test_a_commands_outcome_is_told_and_its_logs_stay(tmp_path: Path) -> None:
    need_lab()
    done = thinwire("lab", "run", lab_file(tmp_path), "--", *peer("ring", "100000"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 0
    assert "host1  sent 0.1" in done.stderr
    logs = tmp_path / "runs" / "lab" / "lab"
    assert sorted(path.name for path in logs.iterdir()) == [f"rank-{rank}.log" for rank in range(4)]


def test_a_failure_is_told_with_its_last_words_and_status_1(tmp_path: Path) -> None:
    need_lab()
    done = thinwire("lab", "run", lab_file(tmp_path), "--json", "--", *peer("fail", "3"), cwd=tmp_path)
    assert done.returncode == 1
    outcome = json.loads(done.stdout)
    assert outcome["first_failure"] == "rank 3 (host 1)"
    assert [end["exit_status"] for end in outcome["ends"]][3] == 7
    assert "rank 3 (host 1) ended with status 7, first of all" in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "some last words"


def training(folder: Path, **sections: dict[str, Any]) -> Path:
    return write_run(folder, make_corpus(folder), cluster={"levels": [2, 2]}, **sections)


def test_levels_that_are_not_the_labs_are_refused(tmp_path: Path) -> None:
    need_lab()
    path = training(tmp_path)
    done = thinwire("lab", "run", lab_file(tmp_path), "--train", path, "--set", "cluster.levels=[4]", cwd=tmp_path)
    assert done.returncode == 2
    assert "do not fit 2 hosts x 2 ranks; try --set" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_trains_on_the_lab(tmp_path: Path) -> None:
    need_lab()
    two_hosts = [{"name": "cluster", "fanout": 2}]
    run = write_run(
        tmp_path, make_corpus(tmp_path), cluster={"levels": two_hosts}, run={"steps": 2, "eval_sequences": 8},
        schedule={"warmup_steps": 1},
    )  # fmt: skip
    done = thinwire("lab", "run", lab_file(tmp_path, "hosts = 2\n"), "--train", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recorded = steps(tmp_path / "run" / "events.jsonl")
    assert sorted(recorded) == [1, 2]
    assert all(sum(record["wire"]["cluster"].values()) > 0 for record in recorded.values())
    assert "host1  sent" in done.stderr


@pytest.mark.slow
def test_a_run_trains_on_the_lab_and_a_fault_at_a_step_slows_it(tmp_path: Path) -> None:
    need_lab()
    path = training(tmp_path, run={"steps": 10}, model={"hidden": 128})
    fault = "[[faults]]\nkind = 'rate'\nhost = 1\nrate = '10 Mbit/s'\nat_step = 5\n"
    done = thinwire("lab", "run", lab_file(tmp_path, TWO_BY_TWO + fault), "--train", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fault at step 5: rate of host 1 to 10 Mbit/s" in done.stderr
    late = [steps(tmp_path / "run" / "events.jsonl")[number] for number in (8, 9, 10)]
    of_rank_0 = sum(sum(record["wire"]["cluster"].values()) for record in late)
    assert of_rank_0 > 100_000, "nothing crossed the link"
    # Two ranks share the uplink, so even with much of it in the sockets' buffers it cannot be faster than one alone.
    assert sum(record["step_s"] for record in late) > of_rank_0 / (10e6 / 8)
