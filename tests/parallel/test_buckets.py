"""Units that travel together send the same bytes in fewer messages, and train to the same bits as one by one."""

from collections import Counter
from typing import Any

import pytest
import torch

from partition_cuts import cuts_of, sent
from partition_toy import Toy, plan_of, train, weights
from thinwire.cluster.cluster import Cluster, Level
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from thinwire.plan.hops import Link, bucket_bytes, bucketed
from worlds import run_world

SIZES = (500, None)
"""Bytes of a bucket: of the toy's units, tens to some hundred bytes each, a few; all of them."""
CODED = {
    "weights": {"node": "int8", "cluster": "delta-int4"},
    "grads": {"node": "bf16", "cluster": "int4"},
    "block": 64,
}


def _run(world: World, cut: tuple[int, int, int], accumulate: int, size: int | None, more: dict[str, Any]) -> Any:
    world.ledger.drain()
    engine = shard(Toy(), plan_of(world, cut, accumulate, bucket_bytes=size, **more), world)
    seen = train(engine, world, accumulate)
    entries = list(world.ledger)
    messages = Counter(entry.purpose for entry in entries if entry.purpose != "control")
    return (seen, weights(engine), sent(world)), messages, engine.timeline


def _alike(world: World, accumulate: int, more: dict[str, Any], cuts: list[tuple[int, int, int]]) -> int:
    """How many messages fewer; the results are compared here."""
    fewer = 0
    for cut in cuts:
        alone, messages, _ = _run(world, cut, accumulate, 0, more)
        for size in SIZES:
            together, fewer_messages, _ = _run(world, cut, accumulate, size, more)
            assert together == alone, (cut, size)
            assert sum(fewer_messages.values()) <= sum(messages.values()), (cut, size)
            fewer += sum((messages - fewer_messages).values())
    return fewer


@pytest.mark.parametrize(
    ("levels", "accumulate", "sockets"),
    [
        ((2,), 2, ()),
        ((2, 2), 1, (1,)),
        pytest.param((2,), 3, (0,), marks=pytest.mark.slow),
        pytest.param((2, 2), 2, (0, 1), marks=pytest.mark.slow),
        pytest.param((1, 3), 2, (1,), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 1, (1, 2), marks=pytest.mark.slow),
    ],
)
def test_every_partition_trains_to_the_same_bits_in_fewer_messages(
    levels: tuple[int, ...], accumulate: int, sockets: tuple[int, ...]
) -> None:
    cuts = list(cuts_of(len(levels)))
    assert min(run_world(levels, _alike, accumulate, {}, cuts, sockets=sockets, timeout_s=280)) > 0


VARIANTS: dict[str, dict[str, Any]] = {
    "kept": {"keep_gathered": True},
    "codecs with error feedback": {"compression": CODED | {"error_feedback": True}},
    "stochastic rounding": {"compression": CODED | {"rounding": "stochastic"}},
    "low rank": {"compression": {"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 1}},
    "bf16": {"compute_dtype": "bf16"},
}


def _variants(world: World) -> dict[str, int]:
    return {name: _alike(world, 2, more, [(0, 0, 1)]) for name, more in VARIANTS.items()}


@pytest.mark.parametrize("sockets", [(1,), pytest.param((), marks=pytest.mark.slow)])
def test_codecs_and_what_they_carry_over_do_not_hear_of_buckets(sockets: tuple[int, ...]) -> None:
    for fewer in run_world((2, 2), _variants, sockets=sockets, timeout_s=280):
        assert all(fewer.values()), fewer


def test_a_bucket_holds_what_fits_and_a_tiny_unit_goes_with_the_one_before() -> None:
    assert bucketed([40, 40, 40, 40], 100) == [2, 2]
    assert bucketed([200, 40, 40, 200, 5, 200], 100) == [1, 2, 2, 1]
    assert bucketed([5, 200, None, 5, 5], 100) == [1, 1, 1, 2]
    assert bucketed([10, 10, 10], 0) == [1, 1, 1]
    assert bucketed([1] * 1000, 100) == [106] * 9 + [46]
    assert bucketed([200, *[1] * 20], 100) == [7, 14]
    assert bucketed([], 100) == []


@pytest.mark.parametrize("latency_s", [0.0, 1e-5, 1e-3, 3e-2])
@pytest.mark.parametrize("bytes_per_s", [1e6, 1e8, 1e10])
def test_a_buckets_size_is_the_one_whose_messages_and_last_wait_cost_least(
    latency_s: float, bytes_per_s: float
) -> None:
    total, link = 2**28, Link(0, 4, latency_s=latency_s, bytes_per_s=bytes_per_s)
    best = bucket_bytes(total, [Link(1, 2), link])

    def cost_s(size: float) -> float:
        return total / size * (latency_s + 4e-4) + size * 3 / 4 / bytes_per_s

    if best < 2**25:  # what may stay in memory
        assert cost_s(best) <= min(cost_s(best * 1.1), cost_s(best / 1.1))
    assert bucket_bytes(total, [Link(0, 1)]) == 0
    assert bucket_bytes(total, [Link(0, 2)]) > 0


def _rates(world: World) -> list[int]:
    engine = shard(Toy(), plan_of(world, (0, 0, 0), bucket_bytes=None), world)
    return [engine.bucket_bytes, sum(unit.nbytes for unit in engine.units)]


def test_links_decide_unless_the_plan_does() -> None:
    slow = Cluster(levels=(Level(name="node", fanout=2, latency_s=0.03, bytes_per_s=1e7),))
    fast = Cluster(levels=(Level(name="node", fanout=2, latency_s=1e-6, bytes_per_s=1e5),))
    (of_slow, total), (of_fast, _) = (run_world(cluster, _rates)[0] for cluster in (slow, fast))
    assert of_fast < total < of_slow


def _looked_at(world: World) -> int:
    """The most units that are whole while all parameters are read one after another, after a step."""
    engine = shard(Toy(), plan_of(world, (0, 0, 0), bucket_bytes=None), world)
    train(engine, world, 1, steps=1)
    most = 0
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.sum().item()
            most = max(most, sum(unit.gathered for unit in engine.units))
    with engine.full_parameters():
        assert all(unit.gathered for unit in engine.units)
    return most


def test_reading_all_parameters_holds_one_unit_at_a_time_whatever_travels_together() -> None:
    assert run_world(2, _looked_at) == [1, 1]
