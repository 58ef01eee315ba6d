"""Labs that are really built: links have their rate, bytes are counted, faults do what they say, ends are gathered."""

import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import PEER, SOURCE, as_ordinary_user, eventually, marked, need_lab, network_namespaces, peer
from thinwire.errors import ConfigError, LabError
from thinwire.lab.config import Fault, LabConfig
from thinwire.lab.lab import Lab
from thinwire.lab.outcome import LabOutcome

MBIT = 1e6 / 8
SIZE = 2_000_000
PACKET = 1514  # bytes on these links, with its headers


def seconds(outcome: LabOutcome) -> list[float]:
    """Of each rank of a ring."""
    return [float(end.tail().split()[0]) for end in outcome.ends]


def resent(outcome: LabOutcome) -> int:
    """Bytes that kernels sent a second time in a ring, at most."""
    return PACKET * sum(int(end.tail().split()[1]) for end in outcome.ends)


@pytest.fixture(autouse=True)
def _a_lab_can_be_had() -> None:
    need_lab()


@pytest.mark.parametrize("hosts", [2, 4, 8])
@pytest.mark.parametrize("rootless", [None, True], ids=["as-we-are", "in-a-user-namespace"])
def test_a_ring_over_all_hosts_carries_what_was_sent_and_leaves_nothing(
    hosts: int, rootless: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_lab(rootless=rootless)
    monkeypatch.setenv("LAB_MARK", mark := uuid.uuid4().hex)
    with Lab(LabConfig(hosts=hosts), rootless=rootless) as lab:
        outcome = lab.run(peer("ring", str(SIZE)), timeout_s=60)
        most = 1.02 * SIZE + resent(outcome)
        namespaces, folder = network_namespaces(marked(mark)), lab.folder
        assert namespaces
    assert outcome.ok
    assert [end.rank for end in outcome.ends] == list(range(hosts))
    for link in outcome.traffic.hosts:
        assert SIZE <= link.sent_bytes <= most
        assert SIZE <= link.received_bytes <= most
    assert not marked(mark)
    assert not network_namespaces() & namespaces
    assert not folder.exists()


_AS_USER = """
import os, sys
from thinwire.lab.config import LabConfig
from thinwire.lab.lab import Lab
assert int(open("/proc/self/status").read().split("CapEff:")[1].split()[0], 16) == 0
hosts, size = int(sys.argv[1]), int(sys.argv[3])
with Lab(LabConfig(hosts=hosts, ranks_per_host=2, host_rate=12.5e6)) as lab:
    outcome = lab.run([sys.executable, sys.argv[2], "ring", sys.argv[3]], timeout_s=60)
    assert outcome.ok, outcome
    most = 1.02 * size + 1514 * sum(int(end.tail().split()[1]) for end in outcome.ends)
    assert all(size <= link.sent_bytes <= most for link in outcome.traffic.hosts), outcome.traffic
    print("ran on", len(outcome.traffic.hosts))
"""


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_an_ordinary_user_gets_the_same(hosts: int, open_folder: Path) -> None:
    command = [sys.executable, "-c", _AS_USER, str(hosts), PEER, str(SIZE)]
    done = subprocess.run(
        as_ordinary_user(command, open_folder),
        env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(SOURCE)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    if "user namespaces" in done.stderr or "does not let" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ran on {hosts}\n"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder everybody may use."""
    folder = Path(tempfile.mkdtemp(prefix="labs-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_link_has_its_rate_both_ways_at_once() -> None:
    with Lab(LabConfig(hosts=2, host_rate=20 * MBIT)) as lab:
        outcome = lab.run(peer("ring", str(SIZE)), timeout_s=60)
        slowest = max(seconds(outcome))
    # The link is never faster than its rate, however busy the machine; how close to it: `benchmarks/lab_accuracy.py`.
    assert outcome.ok
    assert slowest > 0.98 * SIZE / (20 * MBIT)


def test_ranks_of_a_host_talk_over_its_loopback() -> None:
    with Lab(LabConfig(hosts=1, ranks_per_host=2, host_rate=1 * MBIT)) as lab:
        outcome = lab.run(peer("ring", str(10 * SIZE)), timeout_s=60)
    assert outcome.ok
    assert outcome.traffic.hosts[0].sent_bytes < 10_000


def test_a_sites_uplink_is_what_its_hosts_share() -> None:
    config = LabConfig(hosts=4, hosts_per_site=2, site_rate=20 * MBIT)
    with Lab(config) as lab:
        outcome = lab.run(peer("ring", str(SIZE)), timeout_s=60)
        slowest, most = max(seconds(outcome)), 1.05 * SIZE + resent(outcome)
    assert outcome.ok
    assert [SIZE <= site.sent_bytes <= most for site in outcome.traffic.sites] == [True, True]
    assert slowest > 0.95 * SIZE / (20 * MBIT)


@pytest.fixture(scope="module")
def streaming() -> Iterator[Lab]:
    """Rank 1 on host 1 sends to rank 0 on host 0 for ever."""
    need_lab()
    with Lab(LabConfig(hosts=2, host_rate=50 * MBIT)) as lab:
        lab.start(peer("stream"))
        assert eventually(lambda: lab.counters().hosts[0].received_bytes > 10_000)
        yield lab


def rate(lab: Lab, seconds: float = 0.4) -> float:
    """Bytes per second that host 1 sends now; too low rather than too high when the machine is busy."""
    start_s, before = time.monotonic(), lab.counters()
    time.sleep(seconds)
    return (lab.counters() - before).hosts[1].sent_bytes / (time.monotonic() - start_s)


def test_a_rate_can_be_changed_while_bytes_flow(streaming: Lab) -> None:
    assert eventually(lambda: rate(streaming) > 4 * MBIT)
    assert max(rate(streaming) for _ in range(3)) < 52 * MBIT
    streaming.set_rate(1, 2 * MBIT)
    assert eventually(lambda: rate(streaming) < 2.4 * MBIT)
    assert max(rate(streaming) for _ in range(3)) < 2.4 * MBIT
    assert rate(streaming) > 0
    for host in range(2):
        streaming.set_rate(host, None)
    assert eventually(lambda: rate(streaming) > 60 * MBIT)
    for host in range(2):
        streaming.set_rate(host, 50 * MBIT)
    assert eventually(lambda: rate(streaming) < 52 * MBIT)
    assert max(rate(streaming) for _ in range(3)) < 52 * MBIT


def test_a_cut_link_carries_nothing_until_it_is_restored(streaming: Lab) -> None:
    streaming.cut(0)
    received = streaming.counters()
    time.sleep(0.4)
    assert (streaming.counters() - received).hosts[0].received_bytes == 0
    streaming.restore(0)
    assert eventually(lambda: rate(streaming) > 4 * MBIT)


def test_a_frozen_rank_makes_no_progress_until_it_is_thawed(streaming: Lab) -> None:
    streaming.freeze(1)
    assert eventually(lambda: rate(streaming, 0.2) == 0)
    assert rate(streaming) == 0
    streaming.thaw(1)
    assert eventually(lambda: rate(streaming) > 4 * MBIT)


def test_impossible_targets_are_refused(streaming: Lab) -> None:
    with pytest.raises(ValueError, match="no host 2; the lab has 2"):
        streaming.cut(2)
    with pytest.raises(ValueError, match="no rank -1"):
        streaming.kill(-1)
    with pytest.raises(ValueError, match="no site 0; the lab has 0"):
        streaming.cut_site(0)
    with pytest.raises(ValueError, match="0 is no rate"):
        streaming.set_rate(0, 0.0)
    with pytest.raises(LabError, match="still running"):
        streaming.start(peer("sleep"))


def test_a_killed_rank_and_a_dropped_host_are_the_faults_doing() -> None:
    faults = (Fault(kind="kill", rank=0, at_s=0.3), Fault(kind="drop_host", host=1, at_s=0.3))
    said: list[str] = []
    with Lab(LabConfig(hosts=2, ranks_per_host=2, faults=faults), say=said.append) as lab:
        running = lab.start(peer("sleep"))
        assert eventually(lambda: running.look() or running.statuses == (-9, None, -9, -9))
        with pytest.raises(LabError, match="RANK=0"):
            lab.kill(0)
        lab.kill(1)
        outcome = lab.wait(timeout_s=60)
    assert [(end.exit_status, end.by) for end in outcome.ends] == [(-9, "fault")] * 4
    assert outcome.ok
    assert said == ["fault at 0.3 s: kill rank 0", "fault at 0.3 s: drop host 1"]


def test_a_fault_comes_at_its_step(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    with Lab(LabConfig(hosts=1)) as lab:
        with pytest.raises(ConfigError, match="no events"):
            lab.start(peer("sleep"), faults=[Fault(kind="kill", rank=0, at_step=3)])
        running = lab.start(peer("sleep"), faults=[Fault(kind="kill", rank=0, at_step=3)], events=events)
        events.write_text('{"event":"step","step":2}\n')
        time.sleep(0.2)
        assert not running.look()
        with events.open("a") as file:
            file.write('{"event":"step","step":3}\n')
        outcome = lab.wait(timeout_s=60)
    assert outcome.ends[0].by == "fault"


def test_one_failure_stops_the_others_and_is_named_with_its_last_words() -> None:
    with Lab(LabConfig(hosts=2, ranks_per_host=2)) as lab:
        lab.start(peer("fail", "2"))
        outcome = lab.wait(timeout_s=60)
        assert outcome.first_failure is not None
        assert outcome.first_failure.tail() == "some last words"
    assert not outcome.ok
    assert (outcome.first_failure.who, outcome.first_failure.exit_status) == ("rank 2 (host 1)", 7)
    assert [end.by for end in outcome.ends] == ["lab", "lab", "itself", "lab"]


def test_a_command_that_does_not_end_is_stopped() -> None:
    with Lab(LabConfig(hosts=2)) as lab:
        lab.start(peer("sleep"))
        with pytest.raises(LabError, match=r"did not end in 0\.3 s"):
            lab.wait(timeout_s=0.3)
        assert lab.run(peer("ring", "10"), timeout_s=30).ok


def test_an_unknown_program_is_refused() -> None:
    with Lab(LabConfig(hosts=1)) as lab, pytest.raises(ConfigError, match="no program 'nonesuch'"):
        lab.start(["nonesuch"])


def test_a_delay_needs_netem() -> None:
    try:
        with Lab(LabConfig(hosts=2, delay=0.05, host_rate=10 * MBIT)) as lab:
            outcome = lab.run(peer("ring", "1"), timeout_s=30)
            assert max(float(end.tail()) for end in outcome.ends) >= 0.05
    except ConfigError as error:
        assert "no netem" in str(error)
        assert "leave delay out" in str(error)


def test_a_launcher_per_host_starts_its_ranks_itself() -> None:
    code = "import os; print(os.environ['NODE_RANK'], os.environ['PET_NPROC_PER_NODE'], 'RANK' in os.environ)"
    with Lab(LabConfig(hosts=2, ranks_per_host=3)) as lab:
        lab.start([sys.executable, "-c", code], per_host=True)
        outcome = lab.wait(timeout_s=60)
        assert [end.tail() for end in outcome.ends] == ["0 3 False", "1 3 False"]
