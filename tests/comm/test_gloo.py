"""gloo communicators on shared devices."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.comm.world import World
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
