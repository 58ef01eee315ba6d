"""Levels, coordinates and groups; presets; cluster files."""

from pathlib import Path

import pytest

from thinwire.cluster.cluster import Cluster, Device, Level, check_size, read_cluster
from thinwire.cluster.config import ClusterConfig
from thinwire.cluster.hardware import CLUSTERS, DEVICES, preset
from thinwire.config import build, dump_toml
from thinwire.errors import ConfigError

CLUSTER = Cluster(levels=(Level(name="pair", fanout=2), Level(name="node", fanout=3), Level(name="site", fanout=2)))


def test_ranks_number_inner_first_and_groups_partition_the_world() -> None:
    assert CLUSTER.ranks == 12
    assert CLUSTER.coordinates(7) == (1, 0, 1)
    assert CLUSTER.group(7, 0) == (6, 7)
    assert CLUSTER.group(7, 1) == (7, 9, 11)
    assert CLUSTER.group(7, 2) == (1, 7)
    assert CLUSTER.span(7, 1) == tuple(range(6, 12))
    for index in range(3):
        groups = {CLUSTER.group(rank, index) for rank in range(12)}
        assert sorted(rank for group in groups for rank in group) == list(range(12))


def test_shorthand_presets_and_files_resolve(tmp_path: Path) -> None:
    assert build(ClusterConfig, {"levels": [2, 4]}, "x").resolve().level_names == ("node", "cluster")
    assert preset("frontier-48").ranks == 384
    (tmp_path / "cluster.toml").write_text(dump_toml(CLUSTER))
    assert ClusterConfig(file="cluster.toml").resolve(tmp_path) == CLUSTER
    for cluster in CLUSTERS.values():
        assert all(level.origin == "default" for level in cluster.levels)


def test_a_launcher_of_another_size_is_one_clear_sentence() -> None:
    check_size(CLUSTER, 12)
    with pytest.raises(ConfigError, match="pair=2 x node=3 x site=2 make 12 ranks, but the launcher started 4"):
        check_size(CLUSTER, 4)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"preset": "dgx-a100"}, "did you mean 'dgx-a100-4'"),
        ({"device": "h10", "levels": [2]}, "did you mean 'h100'"),
        ({"preset": "laptop", "levels": [2]}, "one of preset, file and levels"),
        ({"levels": [{"name": "a", "fanout": 2}, {"name": "a", "fanout": 2}]}, "names must differ"),
        ({"levels": [{"name": "a", "fanout": 2, "bytes_per_s": 0}]}, "greater than 0"),
        ({"device": {"name": "h10"}}, "no device 'h10'; did you mean 'h100'.*kind = 'cuda'"),
        ({"device": {"name": "tpu", "peak_flops_per_s": 1e15}}, "no device 'tpu'; .*its figures too"),
        ({"device": {"name": "h100", "kind": "cpu"}}, "'h100' is of kind 'cuda', not 'cpu'"),
        ({"device": {"name": "h100", "memory": 5}}, "unknown key 'memory'"),
        ({"device": "cpu", "share_device": True}, "share_device is for accelerators"),
    ],
)
def test_wrong_clusters_get_a_sentence(tree: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(ClusterConfig, tree, "run.toml").resolve()


@pytest.mark.parametrize(
    ("device", "seen", "found"),
    [
        ({"name": "h100"}, [], DEVICES["h100"]),
        ("h100", ["NVIDIA H200"], DEVICES["h100"]),
        ({"name": "h200", "kind": "cuda", "memory_bytes": "100 GiB"}, [],
         DEVICES["h200"].model_copy(update={"memory_bytes": 100 * 2**30, "origin": "given"})),
        ({"name": "mine", "kind": "cuda"}, [], Device(name="mine", kind="cuda")),
        ({"kind": "cuda"}, [], Device(name="cuda", kind="cuda")),
        ({"peak_flops_per_s": "50 GFLOP/s"}, [], Device(peak_flops_per_s=5e10)),
        (None, [], DEVICES["cpu"]),
        (None, ["NVIDIA H200"] * 2, DEVICES["h200"]),
        ("cuda", ["NVIDIA L4"], Device(name="NVIDIA L4", kind="cuda", origin="default")),
        ("cuda", [], Device(name="cuda", kind="cuda")),
        ("cpu", ["NVIDIA H200"], DEVICES["cpu"]),
    ],
)  # fmt: skip
def test_a_device_is_a_preset_a_preset_with_other_figures_or_what_the_machine_has(
    device: object, seen: list[str], found: Device
) -> None:
    config = build(ClusterConfig, {"levels": [2], **({"device": device} if device else {})}, "run.toml")
    cluster = config.resolve(gpus=seen)
    assert cluster.device == found
    again = build(ClusterConfig, {"levels": [2], "device": cluster.device.model_dump(exclude_none=True)}, "run.toml")
    assert again.resolve(gpus=[]).device == found


def test_a_presets_device_stands_whatever_this_machine_has() -> None:
    assert ClusterConfig(preset="frontier-48").resolve(gpus=["NVIDIA H200"]).device == DEVICES["mi250x-gcd"]


def test_a_cluster_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("version = 7\n")
    with pytest.raises(ConfigError, match="version 7; this thinwire reads version 1"):
        read_cluster(tmp_path / "c.toml")
