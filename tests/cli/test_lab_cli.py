"""`thinwire lab` on the command line: wrong input, outcomes, a training run with a fault at a step."""

import json
from pathlib import Path
from typing import Any

import pytest

from labs import need_lab, peer
from runs import make_corpus, thinwire, write_run
from thinwire.files.events import read_events, steps

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
        (TWO_BY_TWO, ["--compute", "pretended", "--train", "run.toml"], "there are real and emulated"),
        (TWO_BY_TWO, ["--compute", "emulated", "--", "true"], "give --train RUN.toml"),
        (TWO_BY_TWO, ["--slow", "1=2", "--train", "run.toml"], "give --compute emulated with it"),
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


TOY = {
    "name": "toy",
    "kind": "cuda",
    "peak_flops_per_s": "5 GFLOP/s",
    "memory_bytes": "1 GiB",
    "memory_bytes_per_s": "10 GB/s",
}


def test_emulated_compute_takes_the_seconds_that_are_predicted_for_another_device(tmp_path: Path) -> None:
    need_lab()
    run = write_run(
        tmp_path, make_corpus(tmp_path), cluster={"levels": [{"name": "cluster", "fanout": 2}], "device": TOY},
        run={"steps": 2}, schedule={"warmup_steps": 1}, plan={"recompute": "full"},
    )  # fmt: skip
    words = ["lab", "run", lab_file(tmp_path, "hosts = 2\n"), "--train", run, "--compute", "emulated", "--slow", "1=3"]
    done = thinwire(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compute is emulated: ranks sleep as long as toy would compute (default: A100 runs")
    begun = next(iter(read_events(tmp_path / "run" / "events.jsonl", "run_start")))["emulated"]
    assert begun["slow"] == [1, 3]
    passes_s = sum(begun["embedding"]) + 2 * (sum(begun["block"]) + begun["block"][0]) + sum(begun["head"])
    recorded = steps(tmp_path / "run" / "events.jsonl")
    # Ranks begin the first step when they are ready; of the second the slow one's seconds are the least.
    assert recorded[2]["step_s"] > 0.99 * 3 * 2 * passes_s, (recorded, begun)
    assert all(sum(record["wire"]["cluster"].values()) > 0 for record in recorded.values())


@pytest.mark.parametrize(
    ("settings", "words", "says"),
    [
        ({"device": {"name": "own", "kind": "cuda"}}, [], "device 'own' has no peak_flops_per_s"),
        ({"device": TOY}, ["--slow", "4=2"], "names rank 4, but there are 4"),
        ({"device": TOY}, ["--set", "compute={embedding=[1,1],block=[1,1],head=[1,1]}"], "has a [compute] of its own"),
        (
            {"device": TOY},
            ["--compute", "real", "--set", "compute={embedding=[1,1],block=[1,1],head=[1,1]}"],
            "a [compute] of its own",
        ),
        ({"device": TOY}, ["--set", "run.compile=true"], "leave run.compile out"),
    ],
)
def test_what_cannot_be_emulated_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: list[str], says: str
) -> None:
    path = write_run(tmp_path, make_corpus(tmp_path), cluster={"levels": [2, 2], **settings})
    done = thinwire("lab", "run", lab_file(tmp_path), "--train", path, "--compute", "emulated", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


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
