"""What the lab decides before it moves anything: commands, limits, places, due faults, sentences."""

import json
from pathlib import Path

import pytest

from thinwire.cli.lab import check_levels
from thinwire.errors import ConfigError, LabError
from thinwire.lab import network
from thinwire.lab import network as shaping
from thinwire.lab.command import StepWatch, due, members, what
from thinwire.lab.config import Fault, LabConfig
from thinwire.lab.host import (
    check_machine,
    is_name,
    may_administrate,
    new_name,
    owner_lives,
    why_command_failed,
    why_no_namespaces,
)
from thinwire.lab.outcome import Traffic, read_interfaces
from worlds import cluster_of


def commands(config: LabConfig) -> list[network.Command]:
    return list(network.build(config, {host: f"ns{host}" for host in range(config.hosts)}, "cubic"))


def test_every_rate_is_set_at_both_ends_of_its_link() -> None:
    config = LabConfig(hosts=4, host_rate=(1e6, 2e6, 3e6, 4e6), hosts_per_site=2, site_rate=5e6)
    limits = [(c.host, c.argv[4], c.argv[c.argv.index("rate") + 1]) for c in commands(config) if "tbf" in c.argv]
    expected = [(None, f"s{site}-{way}", "40000000bit") for site in range(2) for way in ("up", "down")]
    for host in range(4):
        rate = f"{8 * (host + 1)}000000bit"
        expected += [(host, "eth0", rate), (None, f"h{host}", rate)]
    assert limits == expected


def test_unlimited_links_have_no_limiter() -> None:
    assert not any("tbf" in command.argv for command in commands(LabConfig(hosts=3)))


def test_hosts_of_a_site_are_on_its_switch() -> None:
    config = LabConfig(hosts=4, hosts_per_site=2)
    plugged = {
        c.argv[3]: c.argv[5] for c in commands(config) if c.argv[:3] == ("ip", "link", "set") and "master" in c.argv
    }
    uplinks = {"s0-up": "s0", "s0-down": "root", "s1-up": "s1", "s1-down": "root"}
    assert plugged == {**uplinks, "h0": "s0", "h1": "s0", "h2": "s1", "h3": "s1"}


def test_a_delay_stands_inside_the_limiter() -> None:
    delays = [c for c in commands(LabConfig(hosts=2, host_rate=1e6, delay=0.015)) if "netem" in c.argv]
    assert [(c.host, c.argv[5:7], c.argv[-1]) for c in delays] == [(h, ("parent", "1:1"), "15000us") for h in range(2)]


def test_a_bucket_holds_a_large_segment_with_its_headers() -> None:
    for rate in (1e4, 2.5e6, 1.25e8, 1.25e9):
        assert shaping.burst_bytes(rate) >= shaping.SEGMENT_BYTES * (1 + 66 / 1448)
        assert shaping.queue_bytes(rate, shaping.burst_bytes(rate)) > shaping.burst_bytes(rate)
    assert shaping.burst_bytes(1.25e8) == 500_000
    assert shaping.burst_bytes(1.25e8, 30_000) == 30_000


def test_ranks_get_the_variables_of_torchrun() -> None:
    given = {"PATH": "/bin", "RANK": "9", "SLURM_PROCID": "1"}
    placed = list(members(LabConfig(hosts=2, ranks_per_host=2), given, per_host=False, port=1234))
    assert [(m.host, m.rank, m.log_name) for m in placed] == [(r // 2, r, f"rank-{r}.log") for r in range(4)]
    last = placed[3].environment
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    assert [last[name] for name in names] == ["3", "1", "4", "2", "10.88.0.1", "1234", "1"]
    assert last["GLOO_SOCKET_IFNAME"] == "eth0"
    assert last["PATH"] == "/bin"
    assert "SLURM_PROCID" not in last


def test_a_launcher_per_host_gets_torchruns_own_options_and_no_rank() -> None:
    placed = list(members(LabConfig(hosts=2, ranks_per_host=3), {"RANK": "9"}, per_host=True, port=1))
    assert [(m.host, m.rank, m.log_name) for m in placed] == [(0, None, "host-0.log"), (1, None, "host-1.log")]
    assert placed[1].environment["PET_NODE_RANK"] == "1"
    assert placed[1].environment["PET_NPROC_PER_NODE"] == "3"
    assert "RANK" not in placed[1].environment


def test_faults_are_due_by_time_and_by_step() -> None:
    early, late = Fault(kind="cut", host=0, at_s=2), Fault(kind="cut", host=0, at_s=1)
    stepped = Fault(kind="kill", rank=1, at_step=5)
    assert due([early, stepped, late], elapsed_s=0.5, step=None) == ([], [early, stepped, late])
    assert due([early, stepped, late], elapsed_s=3, step=4) == ([late, early], [stepped])
    assert due([stepped], elapsed_s=0, step=6) == ([stepped], [])


def test_faults_are_told_in_words() -> None:
    assert what(Fault(kind="rate", host=1, rate=2.5e6, at_s=0)) == "rate of host 1 to 20 Mbit/s"
    assert what(Fault(kind="rate", site=0, at_s=0)) == "rate of site 0 to unlimited"
    assert what(Fault(kind="drop_host", host=1, at_s=0)) == "drop host 1"


def test_the_step_is_followed_from_now_on_over_torn_lines_and_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps({"event": "step", "step": 99}) + "\n")
    watch = StepWatch(path)
    assert watch.look() is None
    with path.open("a") as file:
        file.write('{"event":"eval","step":50}\n{"event":"step","step":3}\n{"event":"st')
    assert watch.look() == 3
    with path.open("a") as file:
        file.write('ep","step":4}\nnot json\n')
    assert watch.look() == 4
    path.write_text('{"event":"step","step":7}\n')
    assert watch.look() == 7
    assert StepWatch(tmp_path / "none").look() is None


def test_counters_are_read_from_the_kernels_table() -> None:
    text = "head\nhead\n  eth0: 10 2 0 0 0 0 0 0 30 4 0 0 0 0 0 0\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"
    assert read_interfaces(text)["eth0"] == Traffic(30, 10, 4, 2)
    assert Traffic(30, 10, 4, 2) - Traffic(1, 2, 3, 1) == Traffic(29, 8, 1, 1)


def test_a_name_tells_whether_its_owner_lives() -> None:
    name = new_name()
    assert is_name(name)
    assert owner_lives(name)
    pid, ticks, rest = name.removeprefix("thinwire-lab-").split("-")
    assert not owner_lives(f"thinwire-lab-{pid}-{int(ticks) + 1}-{rest}")
    assert not any(map(is_name, ("thinwire-lab-x", "thinwire-lab-1-2", "other-1-2-abc", "thinwire-lab-1-b-c")))


def test_administrators_are_told_by_their_capabilities() -> None:
    assert may_administrate("Name: x\nCapEff:\t000001fffeffffff\n")
    assert not may_administrate("CapEff:\t0000000000000000\n")
    assert not may_administrate(f"CapEff:\t{1 << 21:016x}\n")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "kernel" / "unprivileged_userns_clone"
    setting.parent.mkdir()
    setting.write_text("0\n")
    assert "sudo sysctl -w kernel.unprivileged_userns_clone=1" in why_no_namespaces(
        "no", rootless=True, proc_sys=tmp_path
    )
    setting.write_text("1\n")
    assert "(no); run the lab as root" in why_no_namespaces("no", rootless=True, proc_sys=tmp_path)
    assert "(module sch_tbf)" in why_command_failed("`tc ... tbf` said: Specified qdisc kind is unknown.")
    monkeypatch.setattr("thinwire.lab.host._ADMIN_PATH", "/nowhere")
    with pytest.raises(LabError, match="apt-get install iproute2 util-linux"):
        check_machine({"PATH": "/nowhere"})
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(LabError, match="needs Linux"):
        check_machine({})


def test_a_runs_levels_must_not_cross_the_edges_of_hosts_and_sites() -> None:
    two = LabConfig(hosts=2, ranks_per_host=2)
    for levels in ([2, 2], [1, 2, 2]):
        check_levels(cluster_of(levels), two)
    for levels, says in (([4], "fanout=2"), ([2, 4], "make 8 ranks"), ([2], "make 2 ranks")):
        with pytest.raises(ConfigError, match=says):
            check_levels(cluster_of(levels), two)
    sites = LabConfig(hosts=4, hosts_per_site=2)
    check_levels(cluster_of([2, 2]), sites)
    with pytest.raises(ConfigError, match="do not fit"):
        check_levels(cluster_of([4]), sites)
    check_levels(cluster_of([4]), LabConfig(hosts=4))
