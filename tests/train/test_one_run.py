"""Every rank of a world has the same run, or none begins: one sentence on all of them, with what differs."""

from pathlib import Path

import pytest

from runs import environment, make_corpus, make_text, warm, write_run
from thinwire.data.prepare import Options, prepare
from thinwire.files.events import read_events
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.launch import free_port

SHORT = {"run": {"steps": 2, "eval_every": 0, "sample_tokens": 0}, "schedule": {"warmup_steps": 0}}
ROUNDS = {"kind": "diloco", "level": "cluster", "inner_steps": 2}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """One, the same elsewhere, and another."""
    folder = tmp_path_factory.mktemp("data")
    one = make_corpus(folder / "one")
    prepare(Options((str(folder / "one" / "text"),), validation_fraction=0.1), folder / "same", workers=1)
    prepare(Options((str(make_text(folder / "more", seed=1)),), validation_fraction=0.1), folder / "other", workers=1)
    return one, folder / "same", folder / "other"


def started(run: Path, *settings: list[str]) -> list[tuple[int, str]]:
    """(status, what it said) of one process a rank, each with settings of its own."""
    port = free_port()
    ranks = [
        warm(
            "train", run, *[word for setting in own for word in ("--set", setting)], merged=True,
            env={**environment(), "RANK": str(rank), "WORLD_SIZE": str(len(settings)), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank, own in enumerate(settings)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in ranks]
    return [(process.wait(), text) for process, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize(
    ("sync", "setting", "says"),
    [
        (False, "optimizer.lr=0.5", "optimizer.lr is 0.5 there and 0.003 on rank 0"),
        (False, "plan.partition=zero3", 'plan.partition.grads is "cluster" there and "node" on rank 0'),
        (False, "plan.recompute=full", 'plan.recompute is "full" there and "none" on rank 0'),
        (False, "cluster.levels=[2]", 'levels is [["node", 2]] there and [["node", 1], ["cluster", 2]] on rank 0'),
        (False, "data.path=OTHER", "corpus and tokenizer is "),
        (False, "run.steps=3", "run.steps is 3 there and 2 on rank 0"),
        (True, "plan.sync.inner_steps=1", "plan.sync.inner_steps is 1 there and 2 on rank 0"),
        (True, "run.seed=5", "run.seed is 5 there and 1234 on rank 0"),
    ],
)
def test_a_rank_with_another_run_is_told_on_all(
    sync: bool, setting: str, says: str, corpora: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plan = {"sync": ROUNDS} if sync else {}
    run = write_run(tmp_path, corpora[0], cluster={"levels": [1, 2]}, plan=plan, **SHORT)
    answers = started(run, [], [setting.replace("OTHER", str(corpora[2]))])
    assert [status for status, _ in answers] == [2, 2], answers
    told = [next(line for line in said.splitlines() if line.startswith("thinwire:")) for _, said in answers]
    assert told[0] == told[1]
    assert "does not have rank 0's run" in told[0]
    assert says in told[0]
    assert not (tmp_path / "run" / EVENTS_FILE).exists()


def test_a_rank_whose_input_is_wrong_is_told_on_the_one_that_waits_for_it(
    corpora: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run = write_run(tmp_path, corpora[0], cluster={"levels": [2]}, **SHORT)
    (first, said), (second, own) = started(run, [], ["cluster.levels=[3]"])
    assert (first, second) == (2, 2)
    assert "the levels node=3 make 3 ranks, but the launcher started 2" in own
    assert "thinwire: rank 1 (host " in said
    assert "the levels node=3 make 3 ranks" in said


def test_where_a_host_keeps_the_corpus_is_its_own_business(corpora: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path, corpora[0], cluster={"levels": [2]}, **SHORT)
    answers = started(run, [], [f"data.path={corpora[1]}", "tracking.to=[]"])
    assert [status for status, _ in answers] == [0, 0], answers
    assert next(read_events(tmp_path / "run" / EVENTS_FILE, "run_end"))["reason"] == "finished"
