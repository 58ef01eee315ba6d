"""A corpus that is made on first use is made once; those that wait are told for whom, and what became of it."""

import multiprocessing as mp
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinwire.data.corpus import make_once
from thinwire.errors import DataError, StopAsked, ThinwireError


def ask(out: Path, waiting: Any, answers: Any, ending: str, others: int) -> None:
    """One of several processes: (pid, what happened, for whom it waited). Who makes it lets the others come first."""
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        waiting.release()

    def make() -> None:
        with (out.parent / "makers").open("a") as file:
            file.write(f"{os.getpid()}\n")
        for _ in range(others):
            assert waiting.acquire(timeout=60)
        if ending == "fails":
            raise DataError("no such source")
        if ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        out.mkdir()

    try:
        make_once(out, make, there=out.is_dir, stopped=lambda: False, say=say)
        answers.put((os.getpid(), "there", said))
    except ThinwireError as error:
        answers.put((os.getpid(), str(error), said))


def asked_by(count: int, out: Path, ending: str) -> tuple[int, dict[int, tuple[str, list[str]]]]:
    """(who made it, what each of `count` processes that asked at once was answered)."""
    context = mp.get_context("spawn")
    waiting, answers = context.Semaphore(0), context.Queue()
    asking = [context.Process(target=ask, args=(out, waiting, answers, ending, count - 1)) for _ in range(count)]
    for process in asking:
        process.start()
    told = [answers.get(timeout=60) for _ in range(count - (ending == "killed"))]
    for process in asking:
        process.join(30)
        process.close()
    (maker,) = map(int, (out.parent / "makers").read_text().split())
    return maker, {pid: (what, said) for pid, what, said in told}


def test_one_of_several_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    maker, answers = asked_by(4, tmp_path / "corpus", "made")
    assert {what for what, _ in answers.values()} == {"there"}
    assert answers[maker][1] == []
    for pid, (_, said) in answers.items():
        assert len(said) == (pid != maker)
        assert all(f"waiting for process {maker} on host" in sentence for sentence in said)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "makers"}


@pytest.mark.parametrize("ending", ["fails", "killed"])
def test_who_waited_in_vain_says_so_and_does_not_try_in_turn(ending: str, tmp_path: Path) -> None:
    maker, answers = asked_by(3, tmp_path / "corpus", ending)
    others = {pid: what for pid, (what, _) in answers.items() if pid != maker}
    assert len(others) == 2
    assert all(f"process {maker} on host" in what and "has ended without making" in what for what in others.values())
    assert answers.get(maker, ("no such source", []))[0] == "no such source"
    assert {path.name for path in tmp_path.iterdir()} == {"makers"}


def once(out: Path, make: Callable[[], object], *, stopped: bool = False) -> None:
    make_once(out, make, there=out.is_dir, stopped=lambda: stopped, say=lambda sentence: None)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []
    once(tmp_path, lambda: made.append(1))
    assert made == []


def test_a_stop_ends_the_wait_and_a_failure_that_a_stop_causes_is_a_stop(tmp_path: Path) -> None:
    with pytest.raises(StopAsked, match=r"stopped before .* was made; the same command starts again"):
        once(tmp_path / "corpus", lambda: None, stopped=True)
    asked: list[bool] = []

    def make() -> None:
        asked.append(True)
        raise RuntimeError("a helper was hit by the signal too")

    with pytest.raises(StopAsked):
        make_once(
            tmp_path / "corpus", make, there=lambda: False, stopped=lambda: bool(asked), say=lambda sentence: None
        )
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_made_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "corpus", tmp_path / ("n" * 250)):
        with pytest.raises(DataError, match=r"cannot be made: .*; choose another with --set data\.path=PATH"):
            once(out, lambda: None)
