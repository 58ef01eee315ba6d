"""gloo communicators on shared devices."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from thinwire.comm import gloo
from thinwire.comm.world import World
from worlds import run_world


def _devices(world: World) -> tuple[int, int, float]:
    """(communicators, different devices under them, what ranks add up to over one of them)."""
    host = world.cluster.model_copy(update={"levels": world.cluster.levels[:1]})
    part = world.among(world.cluster.group(world.rank, 0), host)
    made = [world.communicator(range(world.size), members_only=True), *world._groups.values(), *part._groups.values()]
    backends = [group._get_backend(torch.device("cpu")) for group in made]
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total, group=made[0])
    return len(made), len({id(device) for backend in backends for device in backend.options._devices}), float(total)


def test_all_communicators_of_a_rank_share_a_device() -> None:
    assert run_world((2, 2), _devices) == [(10, 1, 6.0)] * 4


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
