"""Ranks that are started where there is no corpus yet: it is made once, or once on each host, and they train on it."""

import json
import signal
import time
from pathlib import Path

import pytest

from runs import environment, make_text, warm, write_run
from thinwire.files.events import steps
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.launch import free_port
from warm import Started

SHORT = {"run": {"steps": 3, "eval_every": 0, "sample_tokens": 0}, "schedule": {"warmup_steps": 0}}


def fresh(folder: Path, levels: list[int], sources: str | Path | None = None) -> Path:
    """A run file whose corpus is not there yet."""
    made = make_text(folder / "text") if sources is None else sources
    run = write_run(folder, folder / "corpora" / "made", cluster={"levels": levels}, **SHORT)
    text = run.read_text().replace("[data]\n", f"[data]\nsources = [{json.dumps(str(made))}]\n")
    run.write_text(text)
    return run


def start(rank: int, size: int, port: int, *arguments: str | Path) -> Started:
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return warm("train", *arguments, merged=True, env={**environment(), **place, "LOCAL_RANK": str(rank)})


def ended(processes: list[Started]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.wait(), text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("per_node", [False, True], ids=["a-process-a-rank", "a-process-a-node"])
def test_on_a_shared_folder_one_process_makes_the_corpus(per_node: bool, tmp_path: Path) -> None:
    run, port = fresh(tmp_path, [2, 2] if per_node else [2]), free_port()
    more = ["--ranks-per-node=2"] if per_node else []
    answers = ended([start(number, 2, port, run, *more) for number in range(2)])
    assert [status for status, _ in answers] == [0, 0], answers
    assert len(steps(tmp_path / "run" / EVENTS_FILE)) == 3
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == ["made"]
    assert sum("tokenising" in said for _, said in answers) == 1


def test_hosts_that_do_not_see_each_others_folders_make_one_each(tmp_path: Path) -> None:
    run, port = fresh(tmp_path, [2]), free_port()
    own = [f"data.path={tmp_path}/disk{host}/corpus" for host in range(2)]
    answers = ended([start(host, 2, port, run, "--set", own[host]) for host in range(2)])
    assert [status for status, _ in answers] == [0, 0], answers
    assert len(steps(tmp_path / "run" / EVENTS_FILE)) == 3
    made = [(tmp_path / f"disk{host}" / "corpus" / "corpus.json").read_text() for host in range(2)]
    assert made[0] == made[1]


def test_what_cannot_be_made_ends_every_rank_with_a_sentence(tmp_path: Path) -> None:
    run, port = fresh(tmp_path, [2], tmp_path / "nothing-here"), free_port()
    answers = ended([start(rank, 2, port, run) for rank in range(2)])
    for status, said in answers:
        assert status == 2
        assert "nothing-here does not exist" in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize("per_node", [False, True])
def test_a_stop_while_the_corpus_is_made_leaves_nothing_and_fails_nothing(per_node: bool, tmp_path: Path) -> None:
    run = fresh(tmp_path, [1], make_text(tmp_path / "text", 4000))
    process = start(0, 1, free_port(), run, "--set", "data.tokenizer=bpe:4096", *(["--ranks-per-node=1"] * per_node))
    while not any((tmp_path / "corpora").glob(".made.partial-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    ((status, said),) = ended([process])
    assert status == 0, said
    assert "was made; the same command starts again" in said
    assert list((tmp_path / "corpora").iterdir()) == []
    assert not (tmp_path / "run").exists()
