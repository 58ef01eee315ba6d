"""Ranks that meet: over the address that reaches the others, in time, or with one sentence on every rank."""

import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from jump import Jump
from labs import need_lab
from runs import make_corpus, thinwire, write_run
from thinwire.comm import interfaces
from thinwire.comm.interfaces import Address, Presence, possible_routes
from thinwire.comm.rendezvous import Rendezvous
from thinwire.comm.world import World
from thinwire.errors import ConfigError, LinkError, StopAsked, ThinwireError
from thinwire.train.launch import free_port
from two_networks import Hosts, alone, joined, two_networks
from worlds import cluster_of

LO, WRONG, RIGHT = (Address(name, ip) for name, ip in (("lo", "127.0.0.1"), ("eth0", "10.9.0.1"), ("eth1", "10.8.0.1")))
HERE = [LO, WRONG, RIGHT]


def test_this_machine_has_loopback_and_no_address_that_means_something_on_one_link_only() -> None:
    found = interfaces.addresses()
    assert Address("lo", "127.0.0.1") in found
    assert not [each for each in found if each.ip.startswith("fe80")]


def test_what_is_asked_for_is_found() -> None:
    assert interfaces.asked(None, {}, HERE, cuda=False) == []
    assert interfaces.asked("eth1", {}, HERE, cuda=False) == [RIGHT]
    assert interfaces.asked(None, {"GLOO_SOCKET_IFNAME": "eth1, eth0"}, HERE, cuda=False) == [RIGHT, WRONG]
    assert interfaces.asked("eth1", {"GLOO_SOCKET_IFNAME": "eth1"}, HERE, cuda=False) == [RIGHT]
    assert interfaces.asked("eth1", {"NCCL_SOCKET_IFNAME": "eth0"}, HERE, cuda=False) == [RIGHT], "no NCCL there"
    assert interfaces.asked("eth1", {"NCCL_SOCKET_IFNAME": "^lo"}, HERE, cuda=True) == [RIGHT]
    assert interfaces.asked(None, {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth1"}, HERE, cuda=True) == [
        WRONG
    ]


@pytest.mark.parametrize(
    ("interface", "environment", "sentence"),
    [
        ("eth7", {}, r"cluster.interface names 'eth7', but .* it has lo \(127.0.0.1\), eth0 \(10.9.0.1\), eth1"),
        (None, {"GLOO_SOCKET_IFNAME": "eth1,ib0"}, "GLOO_SOCKET_IFNAME names 'ib0'"),
        ("eth1", {"GLOO_SOCKET_IFNAME": "eth0"}, "cluster.interface = 'eth1', but GLOO_SOCKET_IFNAME = 'eth0'"),
        ("eth1", {"NCCL_SOCKET_IFNAME": "=eth0"}, "cluster.interface names 'eth1', but NCCL_SOCKET_IFNAME = '=eth0'"),
        (None, {"NCCL_SOCKET_IFNAME": "ib"}, "NCCL_SOCKET_IFNAME = 'ib' leaves .* no interface"),
    ],
)
def test_what_is_missing_or_contradictory_is_refused(
    interface: str | None, environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        interfaces.asked(interface, environment, HERE, cuda=True)


@pytest.mark.parametrize(
    ("pattern", "chosen"), [("eth", "eth0 eth1"), ("=eth1", "eth1"), ("^lo,eth0", "eth1"), ("^=eth", "lo eth0 eth1")]
)
def test_nccls_patterns_mean_what_its_manual_says(pattern: str, chosen: str) -> None:
    assert [name for name in ("lo", "eth0", "eth1") if interfaces.selects(pattern, name)] == chosen.split()


def test_libraries_are_told_the_interface_unless_somebody_has_told_them() -> None:
    environment: dict[str, str] = {}
    interfaces.tell_libraries(environment, ["eth1"], between_hosts=True)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    assert interfaces.selects(environment["NCCL_SOCKET_IFNAME"], "eth1")
    assert not interfaces.selects(environment["NCCL_SOCKET_IFNAME"], "eth10")
    environment = {"NCCL_SOCKET_IFNAME": "ib"}
    interfaces.tell_libraries(environment, ["eth1"], between_hosts=True)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib"}
    environment = {}
    interfaces.tell_libraries(environment, ["lo"], between_hosts=False)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo"}


def _presence(rank: int, machine: str, local: Address | None, reached: str | None, *here: Address) -> Presence:
    return Presence(rank, machine, 100 + rank, machine, "pids", 5, local, reached, here, ())


def test_rank_0s_host_uses_the_address_that_other_hosts_have_reached() -> None:
    """Where the name of rank 0's host means its loopback there, ranks beside it come over loopback."""
    theirs = Address("ib0", "10.8.0.2")
    everyone = [
        _presence(0, "a", None, None, *HERE),
        _presence(1, "a", LO, "127.0.0.1", *HERE),
        _presence(2, "b", theirs, RIGHT.ip, LO, Address("eth0", "10.9.0.2"), theirs),
    ]
    assert [routes[0] for routes in possible_routes(everyone)] == [(RIGHT,), (RIGHT,), (theirs,)]
    assert all((LO,) not in routes for routes in possible_routes(everyone))
    told = [replace(everyone[0], asked=(WRONG,)), *everyone[1:]]
    assert possible_routes(told)[0] == [(WRONG,)]


def test_on_one_host_loopback_will_do() -> None:
    everyone = [_presence(0, "a", None, None, *HERE), _presence(1, "a", LO, "127.0.0.1", *HERE)]
    assert [routes[0] for routes in possible_routes(everyone)] == [(LO,), (LO,)]


def _at_once(size: int, act: Callable[[int], object]) -> list[object]:
    """What `act(rank)` returns, or raises, in a thread for every rank."""

    def tell(rank: int) -> object:
        try:
            return act(rank)
        except ThinwireError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(tell, range(size)))


def _meet(size: int, *, absent: Sequence[int] = (), timeout_s: float = 2.0, stop: int = -1) -> list[object]:
    port, meetings = free_port(), list[Rendezvous]()

    def there() -> bool:  # before rank 0 is, there is nobody to tell
        return any(meeting._rank == 0 and meeting._store is not None for meeting in meetings)

    def act(rank: int) -> object:
        if rank in absent:
            return None
        meeting = Rendezvous(
            rank, size, "127.0.0.1", port, timeout_s=timeout_s, stopped=lambda: rank == stop and there()
        )
        meetings.append(meeting)  # the store lives as long as rank 0's
        meeting.open()
        return meeting._share("said", f"I am {rank}")

    return _at_once(size, act)


def test_all_hear_what_each_says() -> None:
    assert _meet(3) == [["I am 0", "I am 1", "I am 2"]] * 3


def _agree(*statements: dict[str, object], sizes: Sequence[int] = (), ranks: Sequence[int] = ()) -> list[object]:
    """What each of some processes hears that state something; by default as many ranks as there are statements."""
    port, meetings = free_port(), list[Rendezvous]()

    def act(number: int) -> object:
        size = sizes[number] if sizes else len(statements)
        rank = ranks[number] if ranks else number
        meeting = Rendezvous(rank, size, "127.0.0.1", port, timeout_s=8.0, stopped=lambda: False)
        meetings.append(meeting)
        meeting.open()
        meeting.agree(statements[number])
        return None

    return _at_once(len(statements), act)


def test_ranks_that_have_the_same_in_mind_go_on() -> None:
    assert _agree(*[{"plan": {"params": "node"}, "levels": [["node", 3]]}] * 3) == [None] * 3


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"a": 1, "b": {"c": 2.5, "d": "x"}}, r"b\.c is 2\.5 there and 2\.0 on rank 0; give"),
        ({"a": 1, "b": {"c": 2.0}}, r"b\.d is missing there and \"x\" on rank 0; give"),
        ({"a": 1, "b": {"c": 2.0, "d": "x"}, "e": [1]}, r"e is \[1\] there and missing on rank 0; give"),
        ({"a": 2, "b": {"c": 1.0, "d": "y" * 99}}, r"a is 2 .*; b\.c is 1\.0 .*; b\.d is \"y{59}\.\.\. there .*; give"),
        ({f"k{i}": i for i in range(9)}, "; k1 is 1 there and missing on rank 0 and 7 keys more; give"),
    ],
)
def test_a_rank_that_has_something_else_in_mind_ends_all_with_what_differs(other: dict[str, object], says: str) -> None:
    own: dict[str, object] = {"a": 1, "b": {"c": 2.0, "d": "x"}}
    ends = _agree(own, own, other)
    assert [type(end) for end in ends] == [ConfigError] * 3
    assert len({str(end) for end in ends}) == 1
    assert re.match(rf"rank 2 \(host .*\) does not have rank 0's run: .*{says} every rank the same", str(ends[0]))


def test_all_ranks_that_differ_are_counted() -> None:
    ends = _agree({"a": 1}, {"a": 2}, {"a": 3})
    assert len({str(end) for end in ends}) == 1
    assert ", like 1 other rank, does not have rank 0's run: a is 2 there and 1 on rank 0" in str(ends[0])


def test_ranks_of_worlds_of_other_sizes_are_told_the_sizes() -> None:
    for sizes in ((2, 3), (3, 3, 4)):
        ends = _agree(*[{"a": 1}] * len(sizes), sizes=sizes)
        for end in ends:
            assert isinstance(end, ConfigError)
            assert f"rank {len(sizes) - 1} was started as one of {sizes[-1]} ranks, rank 0 at 127.0.0.1:" in str(end)


def test_of_two_processes_of_one_number_one_at_most_stays() -> None:
    ends = _agree(*[{"a": 1}] * 3, sizes=(2, 2, 2), ranks=(0, 1, 1))
    told = [end for end in ends if isinstance(end, LinkError)]
    assert len(told) == 1
    assert "as rank 1 too; give each process a rank of its own" in str(told[0])


def test_ranks_that_do_not_come_are_named_on_all_others_in_time() -> None:
    start_s = time.monotonic()
    first, *others = _meet(4, absent=(1, 3), timeout_s=5)
    assert isinstance(first, LinkError)
    assert str(first).startswith("ranks 1, 3 of 4 did not come to rank 0 at 127.0.0.1:")
    assert "within 5 s" in str(first)
    assert str(others[1]) == str(first)
    assert time.monotonic() - start_s < 10


def test_a_stop_that_one_rank_is_asked_for_ends_all_at_once() -> None:
    start_s = time.monotonic()
    ends = _meet(3, absent=(1,), timeout_s=60, stop=2)
    assert [type(end) for end in (ends[0], ends[2])] == [StopAsked, StopAsked]
    assert time.monotonic() - start_s < 10


def test_rank_0_that_is_not_there_is_told_with_this_sides_address() -> None:
    clock = Jump()
    meeting = Rendezvous(1, 2, "127.0.0.1", free_port(), timeout_s=60, stopped=lambda: False, clock=clock)
    with pytest.raises(
        LinkError, match=r"rank 1 .* could not reach rank 0 at 127.0.0.1:\d+ from lo \(127.0.0.1\) in 60 s"
    ):
        meeting.open()
    assert clock.slept_s == pytest.approx(60)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("", 0)) as taken:
        meeting = Rendezvous(0, 2, "127.0.0.1", taken.getsockname()[1], timeout_s=5, stopped=lambda: False)
        with pytest.raises(LinkError, match="it cannot listen there: Address already in use; choose another port"):
            meeting.open()
        other = Rendezvous(1, 2, "127.0.0.1", taken.getsockname()[1], timeout_s=2, stopped=lambda: False)
        with pytest.raises(LinkError, match="no rank 0 of a run answers there; choose another port"):
            other.open()


def test_an_interface_that_one_rank_lacks_ends_all_with_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()

    def asks(interface: str | None, *rest: object, cuda: bool) -> list[Address]:
        raise ConfigError("this machine has no eth7")

    monkeypatch.setattr("thinwire.comm.world.asked", asks)

    def act(rank: int) -> object:
        if rank == 1:
            return World.join(cluster_of([2]), rank=1, size=2, local_rank=0, host="127.0.0.1", port=port, timeout_s=30)
        meeting = Rendezvous(0, 2, "127.0.0.1", port, timeout_s=30, stopped=lambda: False)
        meeting.open()
        return meeting._share("present", None)

    ends = _at_once(2, act)
    assert [type(end) for end in ends] == [ConfigError, ConfigError]
    assert str(ends[0]) == str(ends[1]) == "rank 1: this machine has no eth7"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def _train(folder: Path, corpus: Path, **cluster: object) -> list[str]:
    levels = [{"name": "cluster", "fanout": 2}]
    run = {"steps": 2, "sample_tokens": 0, "eval_sequences": 4, "timeout": "8 s"}
    path = write_run(folder, corpus, cluster={"levels": levels, **cluster}, run=run, schedule={"warmup_steps": 0})
    return ["-m", "thinwire", "train", str(path)]


def test_an_interface_that_is_not_here_is_refused_before_anything_is_written(tmp_path: Path, corpus: Path) -> None:
    path = write_run(tmp_path, corpus, cluster={"levels": [2], "interface": "eth77"})
    done = thinwire("train", path)
    assert done.returncode == 2
    assert done.stderr.startswith("thinwire: cluster.interface names 'eth77', but ")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    need_lab()
    with two_networks(tmp_path) as made:
        yield made


@pytest.mark.slow
def test_the_interface_that_reaches_the_others_is_found_and_told(hosts: Hosts, tmp_path: Path, corpus: Path) -> None:
    hosts.start_ranks(_train(tmp_path, corpus))
    assert hosts.ends(100) == [0, 0], hosts.output(0) + hosts.output(1)
    assert f"rank 0 talks over eth1 ({joined(0)}): 2 ranks on 2 hosts" in hosts.output(0)
    assert "step 2/2" in hosts.output(0)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["file", "environment"])
def test_a_wrong_interface_ends_all_ranks_in_time_with_a_sentence_that_names_it(
    hosts: Hosts, tmp_path: Path, corpus: Path, named: str
) -> None:
    start_s = time.monotonic()
    environment = {"GLOO_SOCKET_IFNAME": "eth0"} if named == "environment" else {}
    hosts.start_ranks(_train(tmp_path, corpus, **({"interface": "eth0"} if named == "file" else {})), **environment)
    assert hosts.ends(60) == [1, 1]
    assert time.monotonic() - start_s < 40
    for rank in range(2):
        *_, last = hosts.output(rank).splitlines()
        assert f"eth0 ({alone(0)})" in last
        assert f"eth0 ({alone(1)})" in last
        assert "cannot reach rank" in last
        assert "Traceback" not in hosts.output(rank)
        assert "c10d" not in hosts.output(rank)


@pytest.mark.slow
def test_an_address_that_does_not_lead_to_rank_0_is_told_on_both_sides(
    hosts: Hosts, tmp_path: Path, corpus: Path
) -> None:
    hosts.start_ranks(_train(tmp_path, corpus), at="host0")
    assert hosts.ends(60) == [1, 1]
    assert "rank 1 of 2 did not come to rank 0 at host0:29500 within 8 s" in hosts.output(0)
    told = f"rank 1 (host host1) could not reach rank 0 at host0:29500 from eth0 ({alone(1)}) in 8 s"
    assert told in hosts.output(1)


@pytest.mark.slow
def test_where_the_way_to_rank_0_does_not_join_the_others_another_is_taken(
    hosts: Hosts, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first address of both hosts leads nowhere, as where a gateway forwards the port of rank 0 alone."""
    code = (
        "import sys\nfrom thinwire.comm import rendezvous\nplain = rendezvous.possible_routes\n"
        "def wrong_first(everyone):\n    return [sorted(of, key=lambda way: way[0].interface) for of in plain(everyone)]\n"
        "rendezvous.possible_routes = wrong_first\nfrom thinwire.cli import main\nmain(sys.argv[1:])\n"
    )
    _, _, *words = _train(tmp_path, corpus)
    hosts.start_ranks(["-c", code, *words])
    assert hosts.ends(100) == [0, 0], hosts.output(0) + hosts.output(1)
    assert f"rank 0 talks over eth1 ({joined(0)}): 2 ranks on 2 hosts" in hosts.output(0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_ends_ranks_that_wait_for_others(
    hosts: Hosts, tmp_path: Path, corpus: Path, number: signal.Signals, asked: int
) -> None:
    """Rank 1 cannot get to rank 0, so that both wait."""
    _, _, *words = _train(tmp_path, corpus)
    hosts.start_ranks(["-m", "thinwire", *words, "--set", "run.timeout=10 min"], at="host0")
    time.sleep(8)
    assert hosts.ends(0) == [None, None], hosts.output(0) + hosts.output(1)
    start_s = time.monotonic()
    hosts.signal(number, asked)
    while hosts.ends(0)[asked] is None and time.monotonic() - start_s < 30:
        time.sleep(0.05)
    assert hosts.ends(0)[asked] == 0, hosts.output(asked)
    assert time.monotonic() - start_s < 10
    assert asked or "stopped before the ranks had met; the same command starts again" in hosts.output(0)
