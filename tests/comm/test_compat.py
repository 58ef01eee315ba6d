"""Real worlds on a torch without the names that 2.13 brought, and none of the old ones where there are new."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from thinwire.comm.collectives import all_gather, all_reduce_small, reduce_scatter
from thinwire.comm.transport.transport import all_gather_single, reduce_scatter_single
from thinwire.comm.world import World
from worlds import run_world

NEW = ("all_gather_single", "reduce_scatter_single")


def _numbers(world: World, older: bool) -> dict[str, Any]:
    """What every use of the names gives; the world in which they are used is made without them too."""
    for name in NEW if older else ():
        if hasattr(dist, name):
            delattr(dist, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if older else "error")
        part = world.among(range(world.size), world.cluster)
        group = part.group(0, "gather")
        assert group is not None
        own = torch.arange(2.0) + 10 * world.rank
        out, total, chunk = torch.empty(4), torch.tensor([1.0, world.rank], dtype=torch.float64), torch.empty(2)
        all_gather_single(out, own, group=group).wait()
        reduce_scatter_single(chunk, out + world.rank, group=group).wait()
        all_reduce_small(total, world=part)
        summed, gathered = torch.empty(2), torch.empty(4)
        reduce_scatter(summed, out, world=part, level=0, purpose="test").wait()
        all_gather(gathered, own, world=part, level=0, purpose="test").wait()
    near = part.reads_memory(0)
    found = {"out": out, "chunk": chunk, "total": total, "summed": summed, "gathered": gathered}
    return {"near": near, **{name: tensor.tolist() for name, tensor in found.items()}}


@pytest.mark.parametrize("older", [False, True], ids=["as it is", "without the new names"])
def test_a_world_runs_on_either_names(older: bool) -> None:
    first, second = run_world(2, _numbers, older)
    everything = [0.0, 1.0, 10.0, 11.0]
    for found, own in ((first, everything[:2]), (second, everything[2:])):
        assert found["near"]
        assert found["out"] == found["gathered"] == everything
        assert found["total"] == [2.0, 1.0]
        assert found["chunk"] == [2 * each + 1 for each in own]
        assert found["summed"] == [2 * each for each in own]
