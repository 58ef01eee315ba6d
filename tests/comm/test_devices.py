"""Who computes on what: the device of a rank, GPUs that ranks may not share unasked, and what travels over host memory."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from other_device import other_device
from thinwire.cluster.cluster import Cluster, Level
from thinwire.cluster.hardware import DEVICES
from thinwire.comm.codecs.codec import make_codec
from thinwire.comm.collectives import all_gather, all_reduce, reduce_scatter
from thinwire.comm.device import claim, rank_device
from thinwire.comm.transport.gloo import GlooTransport
from thinwire.comm.world import World
from thinwire.errors import ConfigError
from worlds import run_world

H200 = Cluster(device=DEVICES["h200"], levels=(Level(name="node", fanout=2),))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Identifiers of the GPUs that torch claims to see in this process."""
    seen = ["a", "b"]
    told: dict[str, Any] = {
        "is_available": lambda: bool(seen),
        "device_count": lambda: len(seen),
        "set_device": lambda device: None,
        "get_device_name": lambda device: "NVIDIA H200",
        "get_device_properties": lambda device: SimpleNamespace(uuid=seen[device.index]),
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return seen


def test_ranks_of_a_host_take_the_gpu_of_their_number(cards: list[str]) -> None:
    assert [rank_device(H200, rank) for rank in range(2)] == [torch.device("cuda", rank) for rank in range(2)]
    assert rank_device(H200.model_copy(update={"device": DEVICES["cpu"]}), 1) == torch.device("cpu")


def test_a_gpu_that_torch_does_not_see_is_a_sentence(cards: list[str]) -> None:
    cards.clear()
    with pytest.raises(ConfigError, match=r"cluster.device is h200, but torch 2\..* sees no GPU here"):
        rank_device(H200, 0)


def test_a_gpu_is_taken_once_unless_ranks_may_share(cards: list[str]) -> None:
    store = dist.HashStore()
    for rank in range(2):
        claim(store, torch.device("cuda", rank), rank=rank, share=False)
    with pytest.raises(ConfigError, match=r"rank 2 on .* share NVIDIA H200 .* sees 2; .*share_device = true"):
        claim(store, torch.device("cuda", 0), rank=2, share=False)
    claim(store, torch.device("cuda", 0), rank=2, share=True)


def test_ranks_that_see_one_gpu_each_are_told_apart_by_which(cards: list[str]) -> None:
    store = dist.HashStore()
    for rank, bound in enumerate(("x", "y")):
        cards[:] = [bound]
        claim(store, rank_device(H200, rank), rank=rank, share=False)
    with pytest.raises(ConfigError, match="rank 2"):
        claim(store, rank_device(H200, 2), rank=2, share=False)


def test_ranks_on_different_kinds_of_device_are_told(cards: list[str]) -> None:
    store = dist.HashStore()
    claim(store, torch.device("cuda", 0), rank=0, share=False)
    with pytest.raises(ConfigError, match=r"rank 1 on .* would compute on cpu, others on cuda"):
        claim(store, torch.device("cpu"), rank=1, share=False)


def _everything(world: World, device: torch.device) -> list[list[float]]:
    """What collectives of each kind give on a device: plain, coded, of numbers that do not divide, among some ranks."""
    rank, k = world.rank, world.size
    how: dict[str, Any] = {"world": world, "level": 0, "purpose": "test"}
    own = (torch.arange(256.0) * (rank + 1) / 7).to(device)
    gathered, coded = (torch.empty(k * 256, device=device) for _ in range(2))
    all_gather(gathered, own, **how).wait()
    all_gather(coded, own, codec=make_codec("int8"), **how).wait()
    in_place = torch.zeros(k * 4, device=device)
    in_place[rank * 4 : rank * 4 + 4] = rank + 1.0
    all_gather(in_place, in_place[rank * 4 : rank * 4 + 4], **how).wait()
    summed, decoded = (torch.empty(256, device=device) for _ in range(2))
    reduce_scatter(summed, gathered * (rank + 1), **how).wait()
    reduce_scatter(decoded, gathered * (rank + 1), codec=make_codec("int4"), **how).wait()
    odd = torch.arange(7.0).to(device) + rank
    all_reduce(odd, **how)
    transport, among = world.transport(0, "gather"), [0, k - 1]
    assert transport is not None
    swapped = torch.zeros(2, 3, device=device)
    if rank in among:
        rows = torch.arange(6.0).to(device).view(2, 3) + 10 * rank
        for work in transport.all_to_all(swapped, rows, among=among):
            work.wait()
    return [each.cpu().flatten().tolist() for each in (gathered, coded, in_place, summed, decoded, odd, swapped)]


def _over_host(world: World) -> tuple[list[list[float]], list[list[float]]]:
    """(on the CPU, on the other device over host memory)."""
    there = replace(world, device=other_device(), over_host=True).among(range(world.size), world.cluster)
    assert isinstance(there.transport(0, "gather"), GlooTransport)
    return _everything(world, world.device), _everything(there, there.device)


def test_an_accelerators_tensors_over_host_memory_have_the_bits_of_the_cpus() -> None:
    for here, there in run_world(3, _over_host, sockets=[0]):
        assert there == here
    assert here[2] == [1.0] * 4 + [2.0] * 4 + [3.0] * 4


def _on_one_card(world: World) -> list[list[float]]:
    return _everything(world, world.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_several_ranks_on_one_card_have_the_bits_of_the_cpus() -> None:
    shared = Cluster(device=DEVICES["h200"], levels=(Level(name="node", fanout=3),), share_device=True)
    for here, there in zip(run_world(3, _on_one_card, sockets=[0]), run_world(shared, _on_one_card), strict=True):
        assert there == here
