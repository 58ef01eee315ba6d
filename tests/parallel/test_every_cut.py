"""Every legal cut trains like the plain all-reduce: the same sums, the same bytes as the formula, equal replicas."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partition_toy import STEPS, Toy, batches, plan_of, train, weights
from replicated import replicate
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from thinwire.train.announce import predicted_bytes
from worlds import run_world


def legal_cuts(levels: int) -> Iterator[tuple[int, int, int]]:
    for lp, lg, lo in itertools.product(range(-1, levels), repeat=3):
        if lp <= lg <= lo:
            yield lp, lg, lo


def _all_cuts(world: World, accumulate: int) -> dict[tuple[int, int, int], Any]:
    out = {}
    world.ledger.drain()
    cuts = list(legal_cuts(len(world.cluster.levels)))
    for cut, keep in [(cut, False) for cut in cuts] + [(cut, True) for cut in cuts if cut[0] >= 0 and accumulate > 1]:
        engine = shard(Toy(), plan_of(world, cut, accumulate, keep_gathered=keep), world)
        train(engine, world, accumulate, steps=1)  # the first step also agrees on an order
        world.ledger.drain()
        engine = shard(Toy(), plan_of(world, cut, accumulate, keep_gathered=keep), world)
        seen = train(engine, world, accumulate)
        sent = world.ledger.drain().sent_bytes()
        predicted = predicted_bytes(engine)
        for level, purposes in predicted.items():
            for purpose, count in purposes.items():
                assert sent[level][purpose] == STEPS * count, (
                    cut,
                    keep,
                    level,
                    purpose,
                    sent[level][purpose],
                    STEPS * count,
                )
            assert set(sent[level]) <= {*purposes, "control"}, (cut, sent)
        assert keep is False or out[cut] == (seen, weights(engine)), cut
        out[cut] = (seen, weights(engine))
    twin = replicate(Toy(), plan_of(world, (-1, -1, -1), accumulate), world)
    out["twin"] = (train(twin, world, accumulate), weights(twin))  # type: ignore[index]
    return out


@pytest.mark.parametrize(
    ("levels", "accumulate"),
    [
        ((2, 2), 1),
        ((2,), 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [((2,), 1), ((2, 2), 3)]),
        *(pytest.param(levels, each, marks=pytest.mark.slow) for levels in [(2, 1), (1, 2)] for each in (1, 3)),
    ],
)
def test_every_cut_sends_the_formulas_bytes_and_trains_like_the_twin(levels: tuple[int, ...], accumulate: int) -> None:
    results = run_world(levels, _all_cuts, accumulate, sockets=(0, 1) if accumulate == 3 else ())
    for result in results:
        seen, digest = result["twin"]
        for cut, (got, got_digest) in result.items():
            if accumulate == 1 or (cut != "twin" and cut[1] == -1):
                assert (got, got_digest) == (seen, digest), cut
            assert torch.allclose(torch.tensor(got), torch.tensor(seen), rtol=1e-5), cut
    for cut in results[0]:
        assert len({result[cut][1] for result in results}) == 1, f"replicas differ under {cut}"


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(2, 2, 2), (2, 4)])
def test_every_cut_of_eight_ranks_sends_the_formulas_bytes_and_trains_like_the_twin(levels: tuple[int, ...]) -> None:
    for result in run_world(levels, _all_cuts, 1, timeout_s=280, sockets=range(1, len(levels))):
        for cut, got in result.items():
            assert got == result["twin"], cut


def _exact(world: World) -> list[bytes]:
    """Gradients that are small whole numbers: any order of summing gives the same bits, torch's DDP too."""
    digests = []
    for cut in [None, *legal_cuts(len(world.cluster.levels))]:
        module = Toy(exact=True)
        tokens, targets = next(batches(world, 0, 1))
        chosen = F.one_hot(targets, 11).float()
        if cut is None:
            replica = (
                nn.parallel.DistributedDataParallel(module, find_unused_parameters=True) if world.size > 1 else module
            )
            (replica(tokens) * chosen).sum().backward()
            grads = {n: p.grad * world.size for n, p in module.named_parameters() if p.grad is not None}
        else:
            engine = shard(module, plan_of(world, cut), world)
            with engine.micro_batch(last=True):
                (module(tokens) * chosen).sum().backward()
            engine.finish_reduce()
            for part in engine.owned():
                mine = part.grad()
                assert (mine is None) == (part.name not in grads), (cut, part.name)
                if mine is not None:
                    expected = grads[part.name].flatten()[part.offset : part.offset + part.master.numel()]
                    assert torch.equal(mine, expected), (cut, part.name)
            engine.dropped()
            engine.drain()
    return digests


@pytest.mark.parametrize("levels", [(2,), (2, 2)])
def test_exactly_representable_gradients_are_torch_ddps_bit_for_bit(levels: tuple[int, ...]) -> None:
    run_world(levels, _exact, sockets=(1,))


def _variants(world: World) -> dict[str, Any]:
    """Settings that must not change a bit against the same cut without them."""
    cut = (0, 1, 1)
    out: dict[str, Any] = {}
    for name, more in (
        ("plain", {}),
        ("kept", {"keep_gathered": True}),
        ("fp32 named", {"compression": {"grads": {"cluster": "fp32"}}}),
    ):
        engine = shard(Toy(), plan_of(world, cut, **more), world)
        out[name] = (train(engine, world, 1), weights(engine))
        assert not any(flat.gathered for unit in engine.units for flat in unit.flats)
    engine = shard(Toy(), plan_of(world, cut), world, units=["blocks.0", "blocks.2"])
    out["other units"] = (train(engine, world, 1), weights(engine))
    module = Toy()
    for block in module.blocks:
        _recompute_inside(block)
    engine = shard(module, plan_of(world, cut), world)
    out["recomputed"] = (train(engine, world, 1), weights(engine))
    module = Toy()
    plain = module.forward
    module.forward = lambda tokens: _recompute_outside(module, tokens)  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, cut), world)
    out["recomputed around units"] = (train(engine, world, 1), weights(engine))
    assert plain is not None
    module = Toy()
    for block in module.blocks:
        block.forward = torch.compile(block.forward, backend="eager")  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, cut), world)
    out["compiled"] = (train(engine, world, 1), weights(engine))
    return out


def _recompute_inside(block: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    plain = block.forward
    block.forward = lambda x: checkpoint(plain, x, use_reentrant=False)  # type: ignore[method-assign]


def _recompute_outside(module: Any, tokens: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    x = module.embedding(tokens)
    for block in module.blocks:
        x = x + checkpoint(block, x, use_reentrant=False)
    return module.head(module.norm(x)) * module.scale * module.frozen.sum()


def test_units_keeping_recompute_and_compile_change_no_bit() -> None:
    for result in run_world((2, 2), _variants):
        for name, got in result.items():
            assert got == result["plain"], name


def _delayed(world: World, delay_every: int) -> Any:
    """The same training with one rank late at every n-th collective."""
    import time

    from thinwire.comm import handle

    plain, calls = handle.Handle.wait, itertools.count()

    def wait(self: Any) -> float:
        if delay_every and (next(calls) + world.rank) % delay_every == 0:
            time.sleep(0.01)
        return plain(self)

    handle.Handle.wait = wait  # type: ignore[method-assign]
    try:
        engine = shard(Toy(), plan_of(world, (0, 1, 1), 2), world)
        return train(engine, world, 2), weights(engine), engine.timeline
    finally:
        handle.Handle.wait = plain  # type: ignore[method-assign]


@pytest.mark.slow
def test_late_collectives_change_nothing_and_all_ranks_issue_in_the_same_order() -> None:
    runs = [run_world((2, 2), _delayed, every) for every in (0, 3, 5)]
    for ranks in zip(*runs, strict=True):
        assert all(result == ranks[0] for result in ranks)
    timelines = [result[2] for result in runs[0]]
    assert timelines[0] == timelines[1] == timelines[2] == timelines[3]
    assert any(line.startswith("reduce") for line in timelines[0])
