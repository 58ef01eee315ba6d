"""A start that is forked from a server is the one that a shell makes: the same files, words and bits."""

import os
import re
import signal
from pathlib import Path

import pytest

from runs import environment, make_corpus, ranks_of, start, start_anew, wait_for_step, warm, write_run
from thinwire.files.events import steps
from thinwire.train.folder import EVENTS_FILE

RUN = {"steps": 4, "eval_every": 0, "sample_tokens": 0, "eval_sequences": 4}
_UNITS = {"s", "ms", "us", "k", "M", "min"}
"""Of times and rates, which change."""
ENDLESS = {**RUN, "steps": 100_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def _words(said: str) -> list[str]:
    """What is said, without figures and borders, which hold times."""
    return re.sub(r"[^A-Za-z]+", " ", said).split()


@pytest.mark.slow
def test_a_forked_start_trains_to_the_bits_and_words_of_one_anew(corpus: Path, tmp_path: Path) -> None:
    seen = []
    for begin in (start, start_anew):
        process = begin("train", write_run(tmp_path, corpus, cluster={"levels": [2]}, run=RUN), "--fresh")
        said, _ = process.communicate(timeout=100)
        assert process.wait() == 0, said
        losses = {step: record["loss"] for step, record in steps(tmp_path / "run" / EVENTS_FILE).items()}
        files = sorted(
            str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()
        )
        files = [name for name in files if "tensorboard" not in name]  # whose names hold the time
        seen.append((losses, files, [word for word in _words(said) if word not in _UNITS]))
    assert seen[0] == seen[1]
    assert sorted(seen[0][0]) == [1, 2, 3, 4]


def test_a_forked_start_is_a_process_of_its_own_with_its_own_surroundings(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, cluster={"levels": [2]}, run=ENDLESS)
    process = warm("train", path, env={**environment(), "ONLY_HERE": "1"}, cwd=tmp_path)
    try:
        wait_for_step(tmp_path / "run", 2)
        ranks = ranks_of(process)
        assert len({os.getpid(), process.pid, *ranks}) == 4
        for rank in ranks:
            assert os.getsid(rank) == rank
            assert Path(f"/proc/{rank}/cwd").resolve() == tmp_path
            held = {path.resolve() for path in Path(f"/proc/{rank}/fd").iterdir()}
            assert tmp_path / "run" / ".lock" in held
        assert "ONLY_HERE" not in os.environ
    finally:
        process.kill()
    assert process.wait(20) == -signal.SIGKILL
