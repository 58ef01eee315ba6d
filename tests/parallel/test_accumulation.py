"""Accumulation over three micro-batches: cuts that sum alike give the same bits, all of them what torch's DDP gives."""

import warnings
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partition_cuts import Depths, cuts_of
from partition_toy import Toy, batches, plan_of, train, weights
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import shard
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from worlds import run_world

STEPS, MICRO_BATCHES, LR = 3, 3, 0.02


def _loss(module: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(module(tokens).view(-1, 11), targets.view(-1))


def _ddp(world: World) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, weights at the end) of torch's own data parallelism with plain SGD."""
    module = Toy()
    replica = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for number, (tokens, targets) in enumerate(batches(world, step, MICRO_BATCHES)):
            with nullcontext() if number == MICRO_BATCHES - 1 else replica.no_sync():
                loss = _loss(replica, tokens, targets) / MICRO_BATCHES
                loss.backward()
            seen.append(loss.item() * MICRO_BATCHES)
        optimizer.step()
    return seen, {name: p.detach().clone() for name, p in module.named_parameters()}


def _ours(world: World, cut: Depths, graph: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, weights at the end); `graph`: of backwards that record a graph of themselves."""
    engine = shard(Toy(), plan_of(world, cut, MICRO_BATCHES), world)
    optimizer = ShardedOptimizer(engine, lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9))
    seen = []
    for step in range(STEPS):
        for number, (tokens, targets) in enumerate(batches(world, step, MICRO_BATCHES)):
            with engine.micro_batch(last=number == MICRO_BATCHES - 1):
                loss = _loss(engine.module, tokens, targets)
                with warnings.catch_warnings(action="ignore"):  # torch's, of cycles that a recorded graph makes
                    loss.backward(create_graph=graph)
            seen.append(loss.item())
        engine.finish_reduce()
        optimizer.step(grad_scale=1 / (world.size * MICRO_BATCHES))
    with engine.full_parameters():
        return seen, {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def _all(world: World) -> dict[str, Any]:
    ddp_losses, ddp_weights = _ddp(world)
    bits: dict[Depths, Any] = {}
    same = True
    off: dict[Depths, tuple[float, float]] = {}
    for cut in cuts_of(2):
        losses, ours = _ours(world, cut)
        recorded = _ours(world, cut, graph=True)[1]
        same &= all(torch.equal(w, recorded[name]) for name, w in ours.items())
        of_losses = max(abs(a - b) / b for a, b in zip(losses, ddp_losses, strict=True))
        of_weights = max((ours[n] - w).norm() / w.norm() for n, w in ddp_weights.items())
        off[cut] = of_losses, float(of_weights)
        engine = shard(Toy(), plan_of(world, cut, MICRO_BATCHES), world)
        bits[cut] = losses, train(engine, world, MICRO_BATCHES), weights(engine)
    return {
        "bits": bits,
        "off": off,
        "recorded": same,
        "moved": max(abs(a - b) for a, b in zip(ddp_losses, ddp_losses[3:], strict=False)),
    }


@cache
def results() -> list[dict[str, Any]]:
    return run_world((2, 2), _all)


def test_cuts_with_the_same_level_for_gradients_agree_bit_for_bit() -> None:
    for result in results():
        for lg in (-1, 0, 1):
            alike = {cut: bits for cut, bits in result["bits"].items() if cut[1] == lg}
            assert len(alike) >= 3
            first = next(iter(alike.values()))
            for cut, bits in alike.items():
                assert bits == first, cut


def test_every_cut_trains_like_torch_ddp() -> None:
    for result in results():
        assert result["moved"] > 0.01, "nothing was learned"
        for cut, (of_losses, of_weights) in result["off"].items():
            assert of_losses < 1e-5, (cut, of_losses)
            assert of_weights < 1e-5, (cut, of_weights)


def test_a_backward_that_is_recorded_sums_the_same_gradients() -> None:
    assert all(result["recorded"] for result in results())
