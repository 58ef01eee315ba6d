"""Eight ranks on three levels: kept weights, accumulation and codecs at every level, a few cuts of each."""

import hashlib
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partition_cuts import Bytes, Depths, formula, sent
from partition_toy import Toy, adamw, batches, one_step, plan_of, weights
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from worlds import run_world

LEVELS, STEPS = (2, 2, 2), 3
EXACT: list[Depths] = [(-1, -1, 2), (0, 0, 1), (0, 1, 2), (2, 2, 2)]
CODED: dict[str, tuple[Depths, dict[str, Any]]] = {
    "int8 weights everywhere": ((2, 2, 2), {"weights": dict.fromkeys(("node", "cluster", "site"), "int8")}),
    "each level its own": (
        (0, 0, 1),
        {
            "weights": {"node": "bf16", "cluster": "delta-int4"},
            "grads": {"node": "int8", "cluster": "int4", "site": "int8"},
            "error_feedback": True,
        },
    ),
    "bf16 weights": (
        (0, 0, 2),
        {"weights": {"cluster": "delta-int4", "site": "delta-int8"}, "grads": {"node": "bf16", "site": "int8"}},
    ),
    "three hops after the step": (
        (-1, 0, 2),
        {
            "weights": {"node": "delta-int8", "cluster": "delta-int4", "site": "int8"},
            "grads": {"site": "int4-hadamard", "cluster": "int8"},
        },
    ),
}


class Wide(nn.Module):
    """Wide enough that every rank has a part of every buffer when it is padded to whole blocks of 64 on eight ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(11, 40)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 40)) for _ in range(3))
        self.head = nn.Linear(40, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


BUFFERS = [512, 2048, 2048, 2048, 512]
"""Numbers of Wide's flat buffers with padding: 440, three times 1984, 451."""


CHANCE: dict[str, tuple[Depths, dict[str, Any]]] = {
    "weights to replicas by chance": ((0, 0, 1), {"weights": {"cluster": "delta-int4"}, "rounding": "stochastic"}),
    "sums to replicas by chance": ((0, 0, 0), {"grads": {"cluster": "int4", "site": "int8"}, "rounding": "stochastic"}),
}


def _whole_numbers(module: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    return (module(tokens) * F.one_hot(targets, 11).float()).sum()


def _ddp(world: World) -> dict[str, Tensor]:
    module = Toy(exact=True)
    replica = DistributedDataParallel(module, find_unused_parameters=True)
    for number, (tokens, targets) in enumerate(batches(world, 0, 3)):
        with nullcontext() if number == 2 else replica.no_sync():
            _whole_numbers(replica, tokens, targets).backward()
    return {name: p.grad * world.size for name, p in module.named_parameters() if p.grad is not None}


def _exact(world: World) -> list[str]:
    """Gradients that are not torch's, with kept weights and without."""
    expected, wrong = _ddp(world), []
    for cut in EXACT:
        for keep in (False, True) if cut[0] >= 0 else (False,):
            engine = shard(Toy(exact=True), plan_of(world, cut, 3, keep_gathered=keep), world)
            for number, (tokens, targets) in enumerate(batches(world, 0, 3)):
                with engine.micro_batch(last=number == 2):
                    _whole_numbers(engine.module, tokens, targets).backward()
            engine.finish_reduce()
            for part in engine.owned():
                mine, whole = part.grad(), expected.get(part.name)
                own = slice(part.offset, part.offset + part.master.numel())
                if mine is None or whole is None or not torch.equal(mine, whole.flatten()[own]):
                    if mine is None and whole is None:
                        continue
                    wrong.append(f"{part.name} under {cut}, kept: {keep}")
            engine.dropped()
            engine.drain()
    return wrong


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def _held(engine: Sharded, optimizer: ShardedOptimizer) -> str:
    """A hash of the masters and moments of this rank."""
    moments = [piece.tensor for piece in optimizer.for_load()]
    assert len(moments) == 2 * len(engine.owned()) > 0
    return _digest([flat.master for unit in engine.units for flat in unit.flats] + moments)


def _coded(world: World, name: str, cut: Depths, compression: dict[str, Any]) -> tuple[list[Any], Bytes, Bytes]:
    """(per step: loss, whole weights, what lies at depth lp, masters and moments), bytes sent, bytes predicted."""
    dtype = "bf16" if name.startswith("bf16") else "fp32"
    engine = shard(Wide(), plan_of(world, cut, compression={"block": 64, **compression}, compute_dtype=dtype), world)
    optimizer, seen = adamw(engine), []
    counted: Bytes = {}
    for step in range(STEPS):
        world.ledger.drain()
        # the whole weights are looked at below, which is no part of the step
        loss = _step(engine, optimizer, world, step)
        counted = sent(world)
        if step:
            assert counted == formula(engine, 1), (world.rank, step)
        held = _digest([flat.weights for unit in engine.units for flat in unit.flats])
        seen.append((loss, weights(engine), held, _held(engine, optimizer)))
    return seen, counted, formula(engine, 1)


def _step(engine: Sharded, optimizer: ShardedOptimizer, world: World, step: int) -> float:
    tokens, targets = next(batches(world, step, 1))
    with engine.micro_batch(last=True):
        loss = F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum")
        loss.backward()
    engine.finish_reduce()
    optimizer.step(grad_scale=0.01)
    engine.drain()
    return loss.item()


def _all(world: World) -> dict[str, Any]:
    exact = shard(Wide(), plan_of(world, (0, 0, 1)), world)
    plain = adamw(exact)
    losses = [one_step(exact, plain, world, step)[0] for step in range(STEPS)]
    coded = {name: _coded(world, name, cut, compression) for name, (cut, compression) in (CODED | CHANCE).items()}
    return {"exact": _exact(world), "coded": coded, "uncoded losses": losses}


@cache
def results() -> list[dict[str, Any]]:
    return run_world(LEVELS, _all, timeout_s=200)


def test_whole_number_gradients_of_three_micro_batches_are_torch_ddps_bit_for_bit() -> None:
    assert [result["exact"] for result in results()] == [[]] * 8


def test_codecs_at_three_levels_send_the_formulas_bytes() -> None:
    for result in results():
        for name, (_, counted, predicted) in result["coded"].items():
            assert counted == predicted, name
    by_hand = sum(2 * (size // 8 + 2 * (size // 8 // 64)) for size in BUFFERS)
    sent_at_site = results()[0]["coded"]["int8 weights everywhere"][1]["site"]
    assert sent_at_site["P-gather"] == by_hand


def _unequal(cases: dict[str, tuple[Depths, dict[str, Any]]]) -> list[str]:
    """Where ranks differ that hold the same: the whole weights, and what is cut at some depth in the same part."""
    wrong = []
    for name, ((lp, _, lo), _) in cases.items():
        for step in range(STEPS):
            of_ranks = [result["coded"][name][0][step] for result in results()]
            for what, depth, which in (("whole weights", -1, 1), ("weights", lp, 2), ("masters and moments", lo, 3)):
                by_part: dict[int, set[Any]] = {}
                for rank, held in enumerate(of_ranks):
                    by_part.setdefault(rank % 2 ** (depth + 1), set()).add(held[which])
                if any(len(digests) > 1 for digests in by_part.values()):
                    wrong.append(f"{name}: {what} after step {step}")
    return wrong


def test_replicas_are_equal_after_each_step_masters_and_moments_too() -> None:
    assert _unequal(CODED) == []


def test_replicas_are_equal_after_each_step_when_rounding_is_by_chance() -> None:
    assert _unequal(CHANCE) == []


def test_coded_losses_are_near_the_uncoded_ones_and_not_the_same() -> None:
    for result in results():
        plain = torch.tensor(result["uncoded losses"])
        for name, (seen, _, _) in result["coded"].items():
            coded = torch.tensor([loss for loss, *_ in seen])
            assert not torch.equal(coded, plain), name
            assert torch.allclose(coded, plain, rtol=0.1), name
