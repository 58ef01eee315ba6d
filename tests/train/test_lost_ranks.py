"""Runs in which one rank stops, hangs or leaves: the launcher and the other ranks name that one, in time, in our words."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from labs import need_lab
from runs import make_corpus, ranks_of, start, start_anew, wait_for_step, write_run
from thinwire.errors import LinkError, RankLost
from thinwire.train.launch import FailureReport, describe, root_cause
from two_networks import two_networks

TIMEOUT_S = 4
_OTHERS_WORDS = re.compile(r"gloo|c10d|TCPStore|Connection closed|Timed out waiting|Traceback", re.IGNORECASE)
_POISON = """
import os, sys, time
if RANK_1:
    import thinwire.data.loader as loader
    plain, calls = loader.Prefetcher.next, []
    def poisoned(self):
        calls.append(1)
        if len(calls) == 5:
            ACT
        return plain(self)
    loader.Prefetcher.next = poisoned
"""
_LAUNCHED, _PLACED = "any('\"rank\": 1' in word for word in sys.orig_argv)", "os.environ.get('RANK') == '1'"
STUCK = (
    r"has not entered the .* of step 5, for which rank 0 has waited .* s, but has been in the data of step 5 for .* s"
)
ENDED = (
    r"has ended: the .* of step 5, for which rank 0 has waited .*, cannot be completed; its own message or log says why"
)
STOPPED = r"is stopped \(SIGSTOP\): the .*, for which rank 0 has waited .* s, cannot be completed"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def _run_file(folder: Path, corpus: Path, level: str, steps: int) -> Path:
    run = {"steps": steps, "sample_tokens": 0, "eval_sequences": 4, "timeout": f"{TIMEOUT_S} s"}
    return write_run(folder, corpus, cluster={"levels": [{"name": level, "fanout": 2}]}, run=run)


def _poisoned(folder: Path, act: str, where: str) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(_POISON.replace("ACT", act).replace("RANK_1", where))
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "sentence"),
    [("time.sleep(1000)", STUCK), ("exec('while True: pass')", STUCK), ("os._exit(0)", ENDED)],
    ids=["sleeps", "loops", "leaves"],
)
def test_the_launcher_names_a_rank_that_is_stuck_or_has_left(
    corpus: Path, tmp_path: Path, act: str, sentence: str
) -> None:
    path = _run_file(tmp_path, corpus, "node", 20)
    process = start_anew("train", path, **_poisoned(tmp_path, act, _LAUNCHED))
    wait_for_step(tmp_path / "run", 4)
    start_s = time.monotonic()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert time.monotonic() - start_s < TIMEOUT_S + 20
    assert re.search(rf"^thinwire: rank 1 \(host .*, pid \d+\) {sentence}", output, re.MULTILINE), output
    assert output.count("thinwire: ") == 1
    assert not _OTHERS_WORDS.search(output + (tmp_path / "run" / "logs" / "rank-1.log").read_text())


def test_the_launcher_names_a_rank_that_is_stopped(corpus: Path, tmp_path: Path) -> None:
    path = _run_file(tmp_path, corpus, "node", 100_000)
    process = start("train", path)
    wait_for_step(tmp_path / "run", 3)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    start_s = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - start_s < TIMEOUT_S + 15
    assert re.search(rf"thinwire: rank 1 \(host .*, pid \d+\) {STOPPED}", output), output
    assert not _OTHERS_WORDS.search(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        ("time.sleep(1000)", STUCK),
        ("os._exit(0)", ENDED),
        ("os.kill(os.getpid(), 9)", ENDED),
        ("os.kill(os.getpid(), 19)", STOPPED),
        ("raise ZeroDivisionError('a made-up fault')", "failed: ZeroDivisionError: a made-up fault"),
    ],
    ids=["sleeps", "leaves", "killed", "stopped", "raises"],
)
def test_a_rank_on_another_host_is_named_by_those_that_waited_for_it(
    corpus: Path, tmp_path: Path, act: str, sentence: str
) -> None:
    need_lab()
    path = _run_file(tmp_path, corpus, "cluster", 20)
    with two_networks(tmp_path) as hosts:
        variables = _poisoned(tmp_path, act, _PLACED)
        hosts.start_ranks(["-m", "thinwire", "train", str(path)], PYTHONPATH=variables["PYTHONPATH"])
        wait_for_step(tmp_path / "run", 4)
        start_s = time.monotonic()
        while hosts.ends(0)[0] is None and time.monotonic() - start_s < 60:
            time.sleep(0.05)
        assert hosts.ends(0)[0] == 1
        assert time.monotonic() - start_s < TIMEOUT_S + 15
        said = hosts.output(0)
        assert re.search(rf"^thinwire: rank 1 \(host host1, pid \d+\) {sentence}", said, re.MULTILINE), said
        assert not _OTHERS_WORDS.search(said)


@pytest.mark.slow
def test_a_host_whose_cable_is_pulled_is_named_with_interface_and_address(corpus: Path, tmp_path: Path) -> None:
    need_lab()
    path = _run_file(tmp_path, corpus, "cluster", 100_000)
    with two_networks(tmp_path) as hosts:
        hosts.start_ranks(["-m", "thinwire", "train", str(path)])
        wait_for_step(tmp_path / "run", 3)
        hosts.cut(1)
        assert hosts.ends(TIMEOUT_S + 25) == [1, 1]
        for rank in range(2):
            said, other = hosts.output(rank), 1 - rank
            lost = rf"^thinwire: rank {other} \(host host{other}, pid \d+\) cannot be reached any more at "
            way = rf"eth1 \(10.8.0.{other + 1}\) from eth1 \(10.8.0.{rank + 1}\): "
            assert re.search(lost + way, said, re.MULTILINE), said
            assert not _OTHERS_WORDS.search(said)


def test_reports_of_ranks_that_waited_are_echoes_and_name_the_other(tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    describe(0, RankLost("rank 1 (host n1, pid 7) is stopped (SIGSTOP)", 1)).write(reports / "0.json")
    echo = root_cause(reports, {}, tmp_path)
    assert (echo.sentence, echo.cascade, echo.names_a_rank) == (
        "rank 1 (host n1, pid 7) is stopped (SIGSTOP)",
        True,
        True,
    )
    own = FailureReport(2, time.time() + 5, "RuntimeError: mine", "details", 1, False)
    own.write(reports / "2.json")
    assert root_cause(reports, {}, tmp_path) == own
    assert not describe(0, LinkError("rank 0 could not reach rank 1")).cascade
