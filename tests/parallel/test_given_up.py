"""Between steps and in the middle of one: edits, evaluations, steps that are skipped or given up."""

import pytest
import torch
import torch.nn.functional as F

from partition_toy import Toy, adamw, batches, one_step, plan_of, train, weights
from replicated import replicate
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from worlds import run_world


def _edits(world: World, cut: tuple[int, int, int]) -> None:
    """Writes from outside reach every copy: through pieces under any cut, in place where weights are replicated."""
    engine = shard(Toy(), plan_of(world, cut), world)
    train(engine, world, 1, steps=1)
    for piece in engine.for_load():
        piece.tensor.fill_(0.25)
    engine.loaded()
    with engine.full_parameters():
        assert all(bool((p == 0.25).all()) for p in engine.module.parameters())
    if cut[0] < 0:
        with torch.no_grad():
            engine.module.head.weight.fill_(0.5)  # type: ignore[union-attr]
        engine.drain()
        for piece in engine.for_load():
            assert bool((piece.tensor == (0.5 if "embedding" in piece.name else 0.25)).all()), piece.name


@pytest.mark.parametrize("cut", [(-1, -1, -1), (-1, -1, 1), (0, 0, 1), (1, 1, 1)])
def test_a_write_to_the_weights_makes_every_copy_stale(cut: tuple[int, int, int]) -> None:
    run_world((2, 2), _edits, cut)


def _evaluates(world: World) -> None:
    """Forwards without backward, between steps and before the first one."""
    for cut in ((0, 0, 1), (1, 1, 1), (-1, -1, 1)):
        engine = shard(Toy(), plan_of(world, cut), world)
        twin = replicate(Toy(), plan_of(world, cut), world)
        tokens = next(batches(world, 0, 1))[0]
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(engine.module(tokens), twin.module(tokens))
            assert all(unit.gathering is None for unit in engine.units)
            train(engine, world, 1, steps=1)
            train(twin, world, 1, steps=1)


def test_evaluation_between_steps_sees_the_newest_weights_and_leaves_nothing_gathered() -> None:
    run_world((2, 2), _evaluates)


def _skip(world: World) -> None:
    engine = shard(
        Toy(), plan_of(world, (0, 0, 1), compression={"grads": {"cluster": "int4"}, "error_feedback": True}), world
    )
    optimizer = adamw(engine)
    one_step(engine, optimizer, world, 0)
    before = weights(engine)
    residuals = [piece.tensor.clone() for piece in engine.carried_for_save()]
    assert residuals or world.rank % 2 == 1, "the toy fits into the first half of its padded buffers"
    tokens, targets = next(batches(world, 1, 1))
    with engine.micro_batch(last=True):
        F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1)).backward()
    engine.finish_reduce()
    optimizer.skip()
    engine.drain()
    assert optimizer.updates == 1
    assert weights(engine) == before
    after = [piece.tensor for piece in engine.carried_for_save()]
    assert all(torch.equal(a, b) for a, b in zip(residuals, after, strict=True))


def test_a_skipped_step_advances_nothing() -> None:
    run_world((2, 2), _skip)


def _abandoned(world: World) -> None:
    """One or two micro-batches of a step that is given up, their reductions still in flight, leave no trace."""
    for cut in [(-1, -1, -1), (-1, -1, 1), (0, 0, 0), (0, 0, 1), (1, 1, 1)]:
        plain = shard(Toy(), plan_of(world, cut), world)
        expected = one_step(plain, adamw(plain), world, 0)
        for given_up in (1, 2):
            engine = shard(Toy(), plan_of(world, cut), world)
            optimizer = adamw(engine)
            for tokens, targets in batches(world, 1, given_up):
                with engine.micro_batch(last=False):
                    F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1)).backward()
            optimizer.skip()
            assert one_step(engine, optimizer, world, 0) == expected, (cut, given_up)


def test_a_step_given_up_half_way_leaves_no_trace() -> None:
    run_world((2, 2), _abandoned)
