"""gloo communicators on shared devices."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.cluster.cluster import Cluster, Level
from thinwire.comm import gloo
from thinwire.comm.world import World
from thinwire.errors import LinkError
from worlds import run_world


def _devices(world: World) -> tuple[int, int, float]:
    """(communicators, different devices under them, what ranks add up to over two of them, one after the other)."""
    host = world.cluster.model_copy(update={"levels": world.cluster.levels[:1]})
    part = world.among(world.cluster.group(world.rank, 0), host)
    whole, default = world.communicator(range(world.size), members_only=True), dist.group.WORLD
    made = [whole, default, *world._groups.values(), *part._groups.values()]
    backends = [group._get_backend(torch.device("cpu")) for group in made]
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total, group=whole)
    dist.all_reduce(total, group=default)
    return len(made), len({id(device) for backend in backends for device in backend.options._devices}), float(total)


def test_all_communicators_of_a_rank_share_a_device() -> None:
    assert run_world((2, 2), _devices) == [(11, 1, 24.0)] * 4


def _somebodys_group(world: World) -> tuple[float, float]:
    """Sums over a group, and over one of a mesh, that are made without a word about devices."""
    plain, mesh = dist.new_group([0, 1]), init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
    sums = torch.ones(1), torch.ones(1)
    dist.all_reduce(sums[0], group=plain)
    dist.all_reduce(sums[1], group=mesh.get_group("data"))
    return float(sums[0]), float(sums[1])


def test_others_make_groups_as_ever() -> None:
    assert run_world(2, _somebodys_group) == [(2.0, 2.0)] * 2


def _own_timeout(world: World) -> float:
    group = world.communicator(range(2), members_only=True, timeout=timedelta(seconds=7))
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


def test_a_communicator_keeps_its_own_timeout() -> None:
    assert run_world(2, _own_timeout) == [7.0, 7.0]


def test_interfaces_are_those_that_torchs_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gloo.open_devices()) == 1
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo,lo")
    assert len(gloo.open_devices()) == 2
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(RuntimeError, match="nowhere0"):
        gloo.open_devices()


def test_an_interface_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "nowhere0")
    cluster = Cluster(levels=(Level(name="node", fanout=2),))
    with pytest.raises(LinkError, match=r"rank 1 could not meet.*nowhere0"):
        World.join(cluster, rank=1, size=2, local_rank=1, host="127.0.0.1", port=1, timeout_s=5)
