"""bf16 weights and mixed precisions under every cut: 2-byte gathers, fp32 sums, the same bits as the plain twin."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from partition_cuts import Bytes, Depths, cuts_of, formula, sent
from partition_toy import Toy, batches, plan_of, train, weights
from replicated import replicate
from thinwire.comm.world import World
from thinwire.parallel.shard.dtypes import master_dtype
from thinwire.parallel.shard.engine import shard
from thinwire.train.announce import predicted_bytes
from worlds import cluster_of, run_world

STEPS = 2
MIXED = [("fp32", False), ("bf16", False), ("fp32", True)]
"""(plan's precision, whether one layer is fp64)."""


def _bf16(world: World) -> tuple[dict[Depths, tuple[Any, bytes, Bytes, Bytes, Bytes]], Any]:
    """(losses and norms, weights, bytes sent, bytes predicted, bytes predicted for fp32) by cut; the twin's losses."""
    out = {}
    for cut in cuts_of(2):
        full = predicted_bytes(shard(Toy(), plan_of(world, cut), world))
        engine = shard(Toy(), plan_of(world, cut, compute_dtype="bf16"), world)
        world.ledger.drain()
        seen = train(engine, world, 1, steps=STEPS)
        counted = sent(world)
        out[cut] = (seen, weights(engine), counted, formula(engine, STEPS), full)
    twin = replicate(Toy(), plan_of(world, (-1, -1, -1), compute_dtype="bf16"), world)
    return out, train(twin, world, 1, steps=STEPS)


def _loss(module: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(module(tokens).view(-1, 11), targets.view(-1), reduction="sum")


def _nested(grads: list[list[dict[str, Tensor]]], name: str, lg: int) -> Tensor:
    """The sum of grads[rank][micro-batch] in fp32: over levels 0..lg each micro-batch, over the others at the end."""
    batches = [[of_batch[name].float().flatten() for of_batch in of_rank] for of_rank in grads]
    nodes = [[a, b] for a, b in zip(batches[0::2], batches[1::2], strict=True)]
    if lg < 0:
        node, other = ((sum_(a) + sum_(b)) for a, b in nodes)
    elif lg == 0:
        node, other = (sum_([x + y for x, y in zip(a, b, strict=True)]) for a, b in nodes)
    else:
        (a, b), (c, d) = nodes
        return sum_([(w + x) + (y + z) for w, x, y, z in zip(a, b, c, d, strict=True)])
    return node + other


def sum_(tensors: list[Tensor]) -> Tensor:
    """One after another, as accumulation does."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _accumulates(world: World) -> list[str]:
    """Names of gradients that are not the fp32 sum of three micro-batches' bf16 gradients."""
    module = Toy().bfloat16()
    mine = []
    for tokens, targets in batches(world, 0, 3):
        module.zero_grad()
        _loss(module, tokens, targets).backward()
        mine.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine)
    wrong = []
    for cut in ((-1, -1, -1), (-1, -1, 1), (-1, 0, 1), (0, 0, 0), (0, 1, 1), (1, 1, 1)):
        engine = shard(Toy(), plan_of(world, cut, 3, compute_dtype="bf16"), world)
        for number, (tokens, targets) in enumerate(batches(world, 0, 3)):
            with engine.micro_batch(last=number == 2):
                _loss(engine.module, tokens, targets).backward()
        engine.finish_reduce()
        for part in engine.owned():
            mine = part.grad()
            if part.name == "unused":
                right = mine is None
            else:
                expected = _nested(everyone, part.name, cut[1])
                right = mine is not None and torch.equal(
                    mine, expected[part.offset : part.offset + part.master.numel()]
                )
            if not right:
                wrong.append(f"{part.name} under {cut}")
        engine.dropped()
        engine.drain()
    return wrong


class Cast(nn.Linear):
    """A linear layer that computes in the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Mixed(nn.Module):
    """Each block has a layer of fp32 and one of bf16 (or fp64); the head is of bf16."""

    def __init__(self, double: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(Cast(6, 7), nn.GELU(), Cast(7, 6)) for _ in range(3))
        for block in self.blocks:
            block[2].to(torch.float64 if double else torch.bfloat16)  # type: ignore[index]
        self.head = Cast(6, 11).bfloat16()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).float()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).float()


def _mixed(world: World, dtype: str, double: bool) -> dict[Any, Any]:
    """Losses, norms and the dtypes computed with, under several cuts and of the twin."""
    out: dict[Any, Any] = {}
    for cut in ((-1, -1, 1), (0, 0, 1), (1, 1, 1)):
        engine = shard(Mixed(double), plan_of(world, cut, compute_dtype=dtype), world)
        seen = train(engine, world, 1, steps=STEPS)
        out[cut] = (seen, {name: str(p.dtype) for name, p in engine.module.named_parameters()})
    twin = replicate(Mixed(double), plan_of(world, (-1, -1, -1), compute_dtype=dtype), world)
    out["twin"] = (train(twin, world, 1, steps=STEPS), {n: str(p.dtype) for n, p in twin.module.named_parameters()})
    return out


def _all(world: World) -> dict[str, Any]:
    mixed = {(dtype, double): _mixed(world, dtype, double) for dtype, double in MIXED}
    return {"bf16": _bf16(world), "accumulates": _accumulates(world), "mixed": mixed}


@cache
def results() -> list[dict[str, Any]]:
    """All of it in one world."""
    return run_world((2, 2), _all)


def test_bf16_weights_travel_in_two_bytes_and_gradients_in_four_under_every_cut() -> None:
    for result in results():
        for cut in cuts_of(2):
            _, _, counted, predicted, full = result["bf16"][0][cut]
            assert counted == predicted, cut
            for level, purposes in predicted.items():
                for purpose, count in purposes.items():
                    whole = STEPS * full[level].get(purpose, 0)
                    if purpose == "P-refresh" and not whole:
                        continue
                    assert count * (2 if purpose.startswith("P-") else 1) == whole, (cut, level, purpose)


def test_bf16_training_is_bit_for_bit_the_twins_under_every_cut() -> None:
    digests: set[bytes] = set()
    for result in results():
        of_cuts, of_twin = result["bf16"]
        assert all(seen == of_twin for seen, *_ in of_cuts.values())
        digests |= {digest for _, digest, *_ in of_cuts.values()}
    assert len(digests) == 1


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    assert [result["accumulates"] for result in results()] == [[]] * 4


@pytest.mark.parametrize(("dtype", "double"), MIXED)
def test_a_module_of_several_precisions_trains_as_the_twin_does(dtype: str, double: bool) -> None:
    for result in results():
        (expected, dtypes) = result["mixed"][dtype, double]["twin"]
        assert len(set(dtypes.values())) == (1 if dtype == "bf16" and not double else 2 + double), dtypes
        for cut, (got, of_cut) in result["mixed"][dtype, double].items():
            assert of_cut == dtypes, cut
            assert [loss for loss, _ in got] == [loss for loss, _ in expected], cut
            assert torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=1e-12, atol=0), cut


def test_fp64_weights_beside_fp32_ones_keep_fp64_masters() -> None:
    """An fp32 layer before an fp64 one in each block, all computed with in fp64."""
    world = World(0, 1, 0, cluster_of((1,)), torch.device("cpu"))
    given = {name: master_dtype(p.dtype) for name, p in Mixed(double=True).named_parameters()}
    engine = shard(Mixed(double=True), plan_of(world, (-1, -1, -1), compute_dtype="fp64"), world)
    assert {part.name: part.master.dtype for part in engine.owned()} == given
