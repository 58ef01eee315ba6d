"""Whoever keeps others waiting is the one that they name, whatever is wrong with it."""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jump import Jump
from thinwire.comm import lost
from thinwire.comm.collectives import all_gather, all_reduce_small
from thinwire.comm.interfaces import Address, Presence
from thinwire.comm.lost import Answer, find_lost
from thinwire.comm.status import Status, StatusServer, call
from thinwire.comm.world import World
from thinwire.errors import RankLost
from worlds import run_world

RANKS, CULPRIT, PATIENCE_S = 3, 1, 2.0


def _sleeps() -> None:
    time.sleep(PATIENCE_S + 4)
    os._exit(0)


def _loops() -> None:
    end_s = time.monotonic() + PATIENCE_S + 4
    while time.monotonic() < end_s:
        pass
    os._exit(0)


def _is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _is_stopped_elsewhere() -> None:
    """As `_is_stopped`, where the others do not see its process."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exits() -> None:
    os._exit(0)


def _ends(world: World, folder: Path, how: Callable[[], None], small: bool) -> None:
    """One rank goes missing in step 7; what the others are told goes to `folder`, with the seconds it took."""
    world.status.enter("the data", 7)
    if how is _is_stopped_elsewhere:
        lost._process_state = lambda other: None
    if world.rank == CULPRIT:
        time.sleep(0.5)
        how()
    start_s = time.monotonic()
    try:
        if small:
            all_reduce_small(torch.ones(1), world=world)
        else:
            all_gather(torch.empty(3000), torch.ones(1000), world=world, level=0, purpose="weights").wait()
    except RankLost as error:
        told = f"{time.monotonic() - start_s}\n{error.rank}\n{error}"
        (folder / f"{world.rank}.part").write_text(told)
        (folder / f"{world.rank}.part").rename(folder / f"{world.rank}.told")
    while len(list(folder.glob("*.told"))) < RANKS - 1:  # the first to leave would be found gone
        time.sleep(0.01)
    os._exit(0)


_WAYS = [
    (
        _sleeps,
        r"has not entered the .* of step 7, for which rank [02] has waited .* s, but has been in the data of step 7",
    ),
    (
        _loops,
        r"has not entered the .* of step 7, for which rank [02] has waited .* s, but has been in the data of step 7",
    ),
    (_is_stopped, r"is stopped \(SIGSTOP\): the .* of step 7, for which rank [02] has waited .*, cannot be completed"),
    (
        _is_stopped_elsewhere,
        r"does not answer at lo \(127.0.0.1\): its process is stopped or its machine hangs; the .*",
    ),
    (_is_killed, r"has ended: the .* of step 7, for which rank [02] has waited .*, cannot be completed"),
    (_exits, r"has ended: the .* of step 7, for which rank [02] has waited .*, cannot be completed"),
]


_SLOW = pytest.mark.slow
_KINDS = (_sleeps, _is_stopped, _is_killed)
"""One way of being late, one of standing still, one of being gone."""


@pytest.mark.parametrize(
    ("sockets", "small"),
    [((), False), pytest.param((0,), False, marks=_SLOW), pytest.param((0,), True, marks=_SLOW)],
    ids=["memory", "sockets", "numbers"],
)
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        pytest.param(how, sentence, marks=[] if how in _KINDS else _SLOW, id=how.__name__.strip("_"))
        for how, sentence in _WAYS
    ],
)
def test_the_rank_that_does_not_come_is_named_by_all_others_in_time(
    tmp_path: Path, how: Callable[[], None], sentence: str, sockets: Sequence[int], small: bool
) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_world(RANKS, _ends, tmp_path, how, small, sockets=sockets, patience_s=PATIENCE_S, timeout_s=60)
    told = [(tmp_path / f"{rank}.told").read_text().split("\n") for rank in range(RANKS) if rank != CULPRIT]
    for seconds, rank, text in told:
        assert int(rank) == CULPRIT
        assert float(seconds) < PATIENCE_S + 5
        assert_matches(rf"rank {CULPRIT} \(host .*, pid \d+\) {sentence}", text)


def _comes_after(world: World, folder: Path) -> None:
    """The others issue a collective when one rank is long gone."""
    if world.rank == CULPRIT:
        os._exit(0)
    time.sleep(1.5)
    try:
        for _ in range(3):
            out = torch.empty(3000)
            handles = [all_gather(out, torch.ones(1000), world=world, level=0, purpose="weights") for _ in range(3)]
            for handle in handles:
                handle.wait()
    except RankLost as error:
        (folder / f"{world.rank}.told").write_text(str(error))
    while len(list(folder.glob("*.told"))) < RANKS - 1:
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize("sockets", [(), (0,)], ids=["memory", "sockets"])
def test_a_rank_that_went_before_a_collective_was_issued_is_named(tmp_path: Path, sockets: Sequence[int]) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_world(RANKS, _comes_after, tmp_path, sockets=sockets, patience_s=10, timeout_s=60)
    for rank in set(range(RANKS)) - {CULPRIT}:
        assert_matches(rf"rank {CULPRIT} \(host .*, pid \d+\) has ended: ", (tmp_path / f"{rank}.told").read_text())


def assert_matches(pattern: str, text: str) -> None:
    assert re.match(pattern, text), text


def _presence(rank: int) -> Presence:
    address = Address("eth1", f"10.8.0.{rank + 1}")
    return Presence(rank, f"n{rank}", 40 + rank, f"m{rank}", f"p{rank}", 5, address, None, (address,), (), (address,))


def _notes(waiting: str | None = "the all-gather (weights) at level node", **more: Any) -> dict[str, Any]:
    plain = {"phase": "the data", "step": 17, "phase_s": 1.0, "waiting": waiting, "waiting_s": 20.0, "collectives": 9}
    return {**plain, "verdict": None, **more}


EVERYONE = [_presence(rank) for rank in range(4)]


def _found(**answers: Answer) -> tuple[int, str]:
    found = find_lost(EVERYONE, 0, _notes(), {int(name[1:]): answer for name, answer in answers.items()})
    return found["rank"], found["sentence"]


WAITS = Answer("here", notes=_notes())
AWAITED = "the all-gather (weights) at level node of step 17, for which rank 0 has waited 20 s,"


def test_a_rank_that_waits_for_nobody_is_found_by_how_long() -> None:
    busy = Answer("here", notes=_notes(None, phase_s=41.0))
    late = Answer("here", notes=_notes(None, phase_s=2.0))
    assert _found(r1=late, r2=busy, r3=WAITS) == (
        2,
        f"rank 2 (host n2, pid 42) has not entered {AWAITED} but has been in the data of step 17 for 41 s",
    )


def test_who_has_ended_or_is_stopped_explains_more_than_who_is_late() -> None:
    busy = Answer("here", notes=_notes(None, phase_s=41.0))
    assert _found(r1=busy, r2=Answer("stopped"), r3=WAITS)[0] == 2
    assert _found(r1=busy, r2=Answer("stopped"), r3=Answer("ended"))[0] == 3
    rank, sentence = _found(r1=WAITS, r2=Answer("unreachable", "timed out"), r3=busy)
    assert rank == 2
    assert "cannot be reached any more at eth1 (10.8.0.3) from eth1 (10.8.0.1): timed out" in sentence
    assert _found(r1=WAITS, r2=Answer("silent"), r3=busy)[0] == 2
    assert "; so is rank 3" in _found(r1=WAITS, r2=Answer("stopped"), r3=Answer("stopped"))[1]


def test_a_verdict_that_another_rank_has_reached_stands() -> None:
    verdict = {"rank": 3, "sentence": "rank 3 failed: no such file"}
    told = Answer("here", notes=_notes(verdict=verdict))
    assert _found(r1=Answer("ended"), r2=told, r3=Answer("ended")) == (3, "rank 3 failed: no such file")


def test_where_all_wait_the_one_at_an_earlier_collective_is_named() -> None:
    behind = Answer("here", notes=_notes("the all-reduce (control) at level cluster", collectives=8))
    rank, sentence = _found(r1=WAITS, r2=behind, r3=WAITS)
    assert rank == 2
    assert sentence.endswith(f"{AWAITED} but waits in the all-reduce (control) at level cluster, an earlier one")


def test_where_all_wait_for_the_same_it_is_the_network() -> None:
    rank, sentence = _found(r1=WAITS, r2=WAITS, r3=WAITS)
    assert rank == 1
    assert sentence.startswith("nothing arrives any more between rank 0 (host n0, pid 40) over eth1 (10.8.0.1) and")


def test_a_desk_answers_those_who_know_the_token_and_keeps_the_first_verdict() -> None:
    clock = Jump()
    status = Status(clock)
    server = StatusServer(5, status)
    server.token = "word"
    try:
        status.enter("the data", 3)
        clock.sleep(3600)
        first = call("127.0.0.1", server.port, {"token": "word", "verdict": {"rank": 1, "sentence": "one"}}, 5)
        again = call("127.0.0.1", server.port, {"token": "word", "verdict": {"rank": 2, "sentence": "two"}}, 5)
        assert (first["rank"], first["phase"], first["step"], first["waiting"]) == (5, "the data", 3, None)
        assert first["phase_s"] == 3600
        assert again["verdict"] == {"rank": 1, "sentence": "one"}
        with pytest.raises(ConnectionResetError, match="another program answers there"):
            call("127.0.0.1", server.port, {"token": "guess"}, 5)
    finally:
        server.close()
    with pytest.raises(ConnectionRefusedError):
        call("127.0.0.1", server.port, {"token": "word"}, 5)


def _raises(world: World, folder: Path) -> None:
    """One rank fails by itself inside `failures_explained`; the others wait for it."""
    try:
        with world.failures_explained():
            if world.rank == CULPRIT:
                raise ZeroDivisionError("a made-up fault")
            all_reduce_small(torch.ones(1), world=world)
    except (RankLost, ZeroDivisionError) as error:
        (folder / f"{world.rank}.told").write_text(f"{type(error).__name__} {error}")
    if world.rank != CULPRIT:
        while len(list(folder.glob("*.told"))) < RANKS:
            time.sleep(0.01)
    os._exit(0)


def test_the_others_are_told_why_a_rank_has_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_world(RANKS, _raises, tmp_path, patience_s=20, timeout_s=60)
    told = [(tmp_path / f"{rank}.told").read_text() for rank in range(RANKS)]
    assert told[CULPRIT] == "ZeroDivisionError a made-up fault"
    for rank in set(range(RANKS)) - {CULPRIT}:
        assert_matches(
            rf"RankLost rank {CULPRIT} \(host .*, pid \d+\) failed: ZeroDivisionError: a made-up fault", told[rank]
        )
