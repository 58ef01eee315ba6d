"""LAB.toml: what is wrong with it is said in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from thinwire.config import build
from thinwire.errors import ConfigError
from thinwire.lab.config import LabConfig, available_memory_bytes, check_memory, choose_congestion, read_lab

EXAMPLES = Path(__file__).parents[2] / "examples" / "lab"


def lab(**keys: Any) -> LabConfig:
    return build(LabConfig, {"hosts": 2, **keys}, "lab.toml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_read(path: Path) -> None:
    assert read_lab(path).hosts >= 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"hosts": 0}, "1 to 254 hosts, not 0"),
        ({"hosts": 255}, "1 to 254 hosts, not 255"),
        ({"ranks_per_host": 0}, "ranks_per_host"),
        ({"host_rate": 0}, "0 is no rate"),
        ({"host_rate": "-1 Mbit/s"}, "non-negative"),
        ({"host_rate": "nan"}, "finite"),
        ({"host_rate": "11 Gbit/s"}, "11 Gbit/s is outside what the kernel shapes"),
        ({"host_rate": "1 kbit/s"}, "outside what the kernel shapes"),
        ({"host_rate": "100 Mbit"}, "unit of rate"),
        ({"host_rate": ["1 Gbit/s"]}, "1 figures for 2 hosts"),
        ({"hosts_per_site": 3}, "not divisible by hosts_per_site = 3"),
        ({"site_rate": "1 Gbit/s"}, "needs two sites"),
        ({"hosts_per_site": 2, "site_rate": "1 Gbit/s"}, "needs two sites"),
        ({"host_rat": 1}, "did you mean 'host_rate'"),
        ({"burst": 100}, "greater than or equal to 20000"),
        ({"faults": [{"kind": "cut", "host": 0}]}, "one of at_s and at_step"),
        ({"faults": [{"kind": "cut", "host": 0, "at_s": 1, "at_step": 1}]}, "one of at_s and at_step"),
        ({"faults": [{"kind": "cut", "host": 2, "at_s": 1}]}, "names host 2, but the lab has 2"),
        ({"faults": [{"kind": "cut", "site": 0, "at_s": 1}]}, "names site 0, but the lab has 0"),
        ({"faults": [{"kind": "kill", "rank": 2, "at_s": 1}]}, "names rank 2, but the lab has 2"),
        ({"faults": [{"kind": "kill", "host": 1, "at_s": 1}]}, "needs rank"),
        ({"faults": [{"kind": "cut", "rank": 1, "at_s": 1}]}, "needs host or site"),
        ({"faults": [{"kind": "drop_host", "site": 1, "at_s": 1}]}, "needs host"),
        ({"faults": [{"kind": "cut", "host": 1, "rate": 1e6, "at_s": 1}]}, "has no rate"),
        ({"faults": [{"kind": "rate", "host": 1, "rate": 0, "at_s": 1}]}, "0 is no rate"),
        ({"faults": [{"kind": "melt", "host": 1, "at_s": 1}]}, "kind"),
    ],
)
def test_wrong_labs_get_one_sentence(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lab(**keys)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rates_are_one_for_all_or_one_each() -> None:
    assert [lab(host_rate="8 Mbit/s").rate_of(host) for host in range(2)] == [1e6, 1e6]
    assert [lab(host_rate=["8 Mbit/s", "80 Mbit/s"]).rate_of(host) for host in range(2)] == [1e6, 1e7]
    assert lab().rate_of(1) is None


def test_more_ranks_than_memory_are_refused_with_the_number_that_fits() -> None:
    config = lab(ranks_per_host=4, memory_per_rank="1 GiB")
    check_memory(config, 8 * 2**30)
    with pytest.raises(ConfigError, match="at most 5 ranks fit"):
        check_memory(config, 6 * 2**30 - 1)
    assert available_memory_bytes("MemTotal: 9 kB\nMemAvailable:   2 kB\n") == 2048


def test_congestion_control_is_one_that_the_kernel_has() -> None:
    assert choose_congestion(lab(), ["reno", "bbr", "cubic"]) == "cubic"
    assert choose_congestion(lab(), ["reno", "bbr"]) == "reno"
    assert choose_congestion(lab(congestion="bbr"), ["reno", "bbr"]) == "bbr"
    with pytest.raises(ConfigError, match="which has reno, bbr"):
        choose_congestion(lab(congestion="vegas"), ["reno", "bbr"])
