"""However a lab ends, nothing of it is left: no process, no namespace; `lab clean` removes what little may stay."""

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from labs import agents, eventually, holders, marked, need_lab, network_namespaces, peer, peers
from runs import command, environment, thinwire

LAB = "hosts = 2\nranks_per_host = 2\nhost_rate = '100 Mbit/s'\n"


@dataclass
class Running:
    """`thinwire lab run`, in a process of its own, and how to find what belongs to it."""

    owner: subprocess.Popen[str]
    mark: str
    namespaces: set[int]

    def is_gone(self) -> bool:
        return not marked(self.mark) and not network_namespaces() & self.namespaces


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """Four ranks that stream and sleep for ever."""
    need_lab()
    (tmp_path / "lab.toml").write_text(LAB)
    mark = uuid.uuid4().hex
    owner = subprocess.Popen(
        command("lab", "run", tmp_path / "lab.toml", "--", *peer("stream")),
        env={**environment(), "LAB_MARK": mark},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert eventually(lambda: len(peers(mark)) == 4, 60), "the ranks did not start in a minute"
        namespaces = network_namespaces(marked(mark))
        assert len(namespaces) == 3, "one of the lab and one of each host"
        yield Running(owner, mark, namespaces)
    finally:
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        owner.communicate()


def test_killing_the_owner_leaves_nothing(running: Running) -> None:
    running.owner.kill()
    assert eventually(running.is_gone)


def test_killing_the_owner_leaves_nothing_of_frozen_ranks_either(running: Running) -> None:
    for pid in peers(running.mark):
        os.kill(pid, signal.SIGSTOP)
    running.owner.kill()
    assert eventually(running.is_gone)


@pytest.mark.parametrize("who", [agents, holders], ids=["agent", "holder"])
def test_killing_the_inside_is_told_in_one_sentence_and_leaves_nothing(running: Running, who: object) -> None:
    assert callable(who)
    for pid in who(running.mark):
        os.kill(pid, signal.SIGKILL)
    output, _ = running.owner.communicate(timeout=60)
    assert running.owner.returncode == 1
    assert "is gone: its process was killed from outside" in output.splitlines()[-1]
    assert eventually(running.is_gone)


def test_ctrl_c_asks_the_ranks_then_leaves_nothing(running: Running) -> None:
    time.sleep(2)  # a rank that is still starting its interpreter may swallow the first signal
    running.owner.send_signal(signal.SIGINT)
    output, _ = running.owner.communicate(timeout=60)
    assert running.owner.returncode == 130, output
    assert "asking the ranks to stop" in output
    assert eventually(running.is_gone)


def test_clean_removes_a_lab_whose_owner_is_dead_and_keeps_one_in_use(running: Running, tmp_path: Path) -> None:
    (agent,) = agents(running.mark)
    assert "in use" in thinwire("lab", "clean").stdout
    os.kill(agent, signal.SIGSTOP)
    running.owner.kill()
    running.owner.wait()
    assert not eventually(running.is_gone, 0.5)
    removed = json.loads(thinwire("lab", "clean", "--json").stdout)["removed"]
    assert any(name.startswith(f"thinwire-lab-{running.owner.pid}-") for name in removed)
    assert eventually(running.is_gone)


def test_clean_all_removes_one_in_use(running: Running) -> None:
    # Other labs of this user must not be hit by a test: only what is marked is offered to it.
    from thinwire.lab import host as clean

    mine = [lab for lab in clean.find() if lab.pid in holders(running.mark)]
    assert [lab.alive for lab in mine] == [True]
    clean.remove(mine[0])
    assert eventually(lambda: not peers(running.mark))
    running.owner.communicate(timeout=60)
    assert running.owner.returncode == 1
    assert eventually(running.is_gone)


def test_what_is_not_a_labs_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.lab import host as clean

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("thinwire-lab-1-2-abc", "thinwire-lab-mine", "other-1-2-abc"):
        (tmp_path / name).mkdir()
    for lab in clean.find():
        if not lab.alive:
            clean.remove(lab)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1-2-abc", "thinwire-lab-mine"]
