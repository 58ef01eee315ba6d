"""Codecs at work in the engine: bytes by the formula, replicas equal, delta references exact, training close."""

from typing import Any

import pytest
import torch

from partition_toy import Toy, adamw, one_step, plan_of, train, weights
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.parallel.shard.engine import shard
from thinwire.train.announce import predicted_bytes, predicted_total
from worlds import run_world

STEPS = 3
WIRES: dict[str, tuple[tuple[int, int, int], dict[str, Any], float]] = {
    "int8 both ways": ((0, 0, 1), {"weights": {"cluster": "int8"}, "grads": {"cluster": "int8"}}, 0.02),
    "int4 gradients, delta weights": ((0, 0, 1), {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "int4"}}, 0.1),
    "with error feedback": ((0, 0, 1), {"grads": {"cluster": "int4"}, "error_feedback": True}, 0.1),
    "zero++": ((0, 1, 1), {"weights": {"cluster": "int8"}, "grads": {"cluster": "int4"}}, 0.1),
    "two hops": ((-1, -1, 1), {"grads": {"node": "int8", "cluster": "int4"}, "weights": {"cluster": "bf16"}}, 0.1),
    "replicas above": ((0, 0, 0), {"grads": {"cluster": "int8"}}, 0.02),
    "everywhere e3m0": ((-1, -1, -1), {"grads": {"node": "int8", "cluster": "e3m0"}}, 0.3),
    "hadamard by chance": ((0, 0, 1), {"grads": {"cluster": "int4-hadamard"}, "rounding": "stochastic"}, 0.2),
    "low rank to the optimizer's shard": ((0, 0, 1), {"grads": {"cluster": "lowrank"}, "rank": 2, "rank_from": 0}, 0.3),
    "low rank between replicas": (
        (0, 0, 0), {"grads": {"node": "int8", "cluster": "lowrank"}, "rank": 2, "rank_from": 0}, 0.3
    ),
    "low rank, nothing cut": ((-1, -1, -1), {"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0}, 0.5),
    "low rank from whole to shard": (
        (-1, -1, 1),
        {"grads": {"node": "int8", "cluster": "lowrank"}, "weights": {"cluster": "delta-int8"}, "rank": 3, "rank_from": 0},
        0.3,
    ),
    "deltas over two hops": ((-1, -1, 1), {"weights": {"node": "delta-int8", "cluster": "delta-int4"}}, 0.1),
}  # fmt: skip


def _run(world: World, cut: tuple[int, int, int], compression: dict[str, Any]) -> Any:
    exact = train(shard(Toy(), plan_of(world, cut), world), world, 1)
    train(shard(Toy(), plan_of(world, cut, compression=compression), world), world, 1, steps=1)
    world.ledger.drain()
    engine = shard(Toy(), plan_of(world, cut, compression=compression), world)
    seen = train(engine, world, 1)
    sent = world.ledger.drain().sent_bytes()
    for level, purposes in predicted_bytes(engine).items():
        for purpose, count in purposes.items():
            assert sent[level][purpose] == STEPS * count, (level, purpose)
    return exact, seen, weights(engine)


@pytest.mark.parametrize("name", WIRES)
def test_coded_training_sends_the_formulas_bytes_and_stays_close(name: str) -> None:
    cut, compression, tolerance = WIRES[name]
    results = run_world((2, 2), _run, cut, compression)
    for exact, seen, digest in results:
        assert seen != exact, "the codec did nothing"
        assert torch.allclose(torch.tensor(seen), torch.tensor(exact), rtol=tolerance)
        assert digest == results[0][2], "replicas differ"


def _rank_of_everything(world: World) -> None:
    for cut in ((0, 0, 1), (0, 0, 0), (-1, -1, -1)):
        exact = shard(Toy(), plan_of(world, cut), world)
        coded = shard(
            Toy(),
            plan_of(world, cut, compression={"grads": {"cluster": "lowrank"}, "rank": 1000, "rank_from": 0}),
            world,
        )
        assert train(coded, world, 1) == train(exact, world, 1), cut
        assert weights(coded) == weights(exact), cut


def test_a_rank_that_no_matrix_gains_by_changes_no_bit() -> None:
    run_world((2, 2), _rank_of_everything)


def _whole_at_first(world: World) -> None:
    for cut in ((0, 0, 1), (0, 0, 0), (-1, -1, -1)):
        exact = shard(Toy(), plan_of(world, cut), world)
        coded = shard(Toy(), plan_of(world, cut, compression={"grads": {"cluster": "lowrank"}, "rank": 1}), world)
        assert train(coded, world, 1, steps=2) == train(exact, world, 1, steps=2), cut
        assert weights(coded) == weights(exact), cut
        world.ledger.drain()
        fresh = shard(Toy(), plan_of(world, cut, compression={"grads": {"cluster": "lowrank"}, "rank": 1}), world)
        train(fresh, world, 1, steps=4)
        counted, foreseen = world.ledger.drain().sent_bytes(), predicted_total(fresh, 0, 4)
        for level, purposes in foreseen.items():
            assert {purpose: counted[level][purpose] for purpose in purposes} == purposes, (cut, level)
        two, four = (predicted_total(fresh, first, 2)["cluster"]["G-reduce"] for first in (0, 2))
        assert two > four == 2 * predicted_bytes(fresh)["cluster"]["G-reduce"]


def test_low_rank_begins_after_two_steps_whose_sums_are_whole() -> None:
    run_world((2, 2), _whole_at_first)


def _copies(world: World) -> list[bytes]:
    """The weights after each of three steps, of which every rank has a copy; of the last blocks not all have a matrix."""
    compression = {"grads": {"node": "int8", "cluster": "lowrank"}, "rank": 1, "rank_from": 0, "block": 64}
    engine = shard(Toy(), plan_of(world, (-1, -1, -1), compression=compression), world)
    optimizer = adamw(engine)
    return [one_step(engine, optimizer, world, step)[-1] for step in range(3)]


def test_ranks_without_a_matrix_keep_step_with_those_that_have_one() -> None:
    first, *others = run_world((2, 2), _copies)
    assert others == [first] * 3


def _noise(world: World) -> list[float]:
    """The largest magnitude in the padding of sums after each of 12 steps."""
    compression = {"grads": {"node": "int4-hadamard"}, "block": 64}
    engine = shard(Toy(), plan_of(world, (-1, -1, -1), compression=compression), world)
    optimizer, seen = adamw(engine), []
    for step in range(12):
        one_step(engine, optimizer, world, step)
        buffers = [grads for unit in engine.units for grads in unit.grads.values()]
        seen.append(max(float(grads.buffer[grads.spec.layout.used :].abs().max()) for grads in buffers))
    return seen


def test_noise_that_rotated_blocks_leave_in_padding_is_not_summed_again() -> None:
    for seen in run_world(2, _noise):
        assert seen[0] > 0
        assert max(seen) < 4 * seen[0]


def _gathered_twice(world: World) -> None:
    compression = {"weights": {"node": "int4"}, "rounding": "stochastic", "block": 64}
    engine = shard(Toy(), plan_of(world, (0, 0, 0), compression=compression), world)
    optimizer = adamw(engine)
    one_step(engine, optimizer, world, 0)
    first = weights(engine)
    assert weights(engine) == first
    one_step(engine, optimizer, world, 1)
    assert weights(engine) != first


def test_all_gathers_of_a_step_round_by_the_same_chance() -> None:
    """A recomputed forward sees the weights that the first one saw."""
    run_world(2, _gathered_twice)


def _references(world: World) -> None:
    """After every step what the sender thinks a receiver holds is what it holds."""
    compression = {"weights": {"cluster": "delta-int4"}}
    engine = shard(Toy(), plan_of(world, (0, 0, 1), compression=compression), world)
    optimizer = adamw(engine)
    for _ in range(4):
        train_one(engine, optimizer, world)
        for unit in engine.units:
            for flat in unit.flats:
                pair = [torch.empty_like(flat.weights) for _ in range(2)]
                torch.distributed.all_gather(pair, flat.weights, group=world.group(1, "small"))
                assert torch.equal(pair[0], pair[1])
                mine = flat.weights[flat.spec.within(1, 0)]
                if flat.trained:
                    assert (
                        mine - flat.master
                    ).abs().max() <= 0.02  # noise does not grow: deltas are against what is held


def train_one(engine: Any, optimizer: Any, world: World) -> None:
    one_step(engine, optimizer, world, 0)


def test_delta_senders_know_what_receivers_hold() -> None:
    run_world((2, 2), _references)


@pytest.mark.parametrize(
    ("cut", "compression", "says"),
    [
        ((0, 0, 0), {"weights": {"cluster": "delta-int4"}}, "needs a copy at the receiver"),
        ((0, 0, 1), {"grads": {"cluster": "delta-int4"}}, "a delta needs something the receiver holds"),
        ((0, 0, 1), {"grads": {"rack": "int8"}}, "names the level 'rack'; there are node, cluster"),
        ((0, 1, 1), {"grads": {"cluster": "int8"}, "error_feedback": True}, "runs once a step"),
        ((0, 0, 1), {"grads": {"cluster": "int3"}}, "'int4'"),
        ((0, 0, 1), {"weights": {"cluster": "lowrank"}}, "cannot carry weights"),
        ((0, 1, 1), {"grads": {"cluster": "lowrank"}}, "so that it runs once a step"),
        ((-1, -1, 1), {"grads": {"node": "lowrank"}}, "needs the outermost level"),
        ((0, 0, 1), {"grads": {"cluster": "lowrank"}, "rank": 0}, "rank"),
    ],
)
def test_impossible_codecs_get_a_sentence(cut: tuple[int, int, int], compression: dict[str, Any], says: str) -> None:
    from worlds import cluster_of

    class Anywhere:
        cluster = cluster_of((2, 2))

    with pytest.raises(ValueError, match=says):
        plan_of(Anywhere(), cut, compression=compression)  # type: ignore[arg-type]


def _fp64(world: World) -> str:
    with pytest.raises(PlanError) as caught:
        shard(Toy().double(), plan_of(world, (0, 0, 1), compression={"grads": {"cluster": "int8"}}), world)
    return str(caught.value)


def test_codecs_for_fp64_are_refused_not_ignored() -> None:
    assert "codecs carry fp32 numbers" in run_world((2, 2), _fp64)[0]
