"""An axis that nobody knows yet needs three things: what applies it to a model, what it sends as hops, and this test."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partition_toy import adamw, plan_of
from thinwire.comm.collectives import all_gather, reduce_scatter
from thinwire.comm.world import World
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer
from thinwire.parallel.shard.engine import shard
from thinwire.plan.hops import Hop
from thinwire.plan.operations import Unit
from worlds import run_world

SPEC = ModelSpec(vocab_size=48, hidden=16, layers=3, heads=2, kv_heads=1, head_size=8, ffn=32, max_tokens=16)


class _Mean(torch.autograd.Function):
    """The mean over a level's ranks of what goes forward, and of the gradients that come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _mean(x, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _mean(grads[0], ctx.world), None


def _mean(x: Tensor, world: World) -> Tensor:
    k, flat = world.fanout(0), x.detach().reshape(-1).contiguous()
    part, full = flat.new_empty(flat.numel() // k), torch.empty_like(flat)
    reduce_scatter(part, flat, world=world, level=0, purpose="echo").wait()
    all_gather(full, part / k, world=world, level=0, purpose="echo").wait()
    return full.view_as(x)


def apply_echo(model: nn.Module, world: World) -> None:
    """Blocks see the mean over the first level of what comes into them."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda module, args: (_Mean.apply(args[0], world), *args[1:]))


def echoed(unit: Unit, *, elements: int, k: int) -> Unit:
    """The hops of one pass through a block: the same in forward and backward."""
    if not unit.name.startswith("blocks."):
        return unit
    n = elements // k
    hops = tuple(
        Hop(0, algorithm, "echo", n, None, 4 * n * (k - 1), 4 * elements)
        for algorithm in ("reduce_scatter", "all_gather")
    )
    return unit._replace(forward_hops=hops, backward_hops=hops)


def _echo(world: World, accumulate: int) -> None:
    torch.manual_seed(0)
    model = Transformer(SPEC)
    apply_echo(model, world)
    engine = shard(model, plan_of(world, (0, 0, 0), accumulate), world)
    optimizer = adamw(engine)
    planned = engine.program(inside=lambda unit: echoed(unit, elements=8 * 16, k=world.fanout(0)))
    assert planned.digest != engine.program().digest
    for _ in range(2):
        world.ledger.drain()
        for number in range(accumulate):
            tokens = torch.arange(8).view(1, 8)
            with engine.micro_batch(last=number == accumulate - 1):
                model(tokens, tokens).backward()
        optimizer.step()
        engine.drain()
        sent = world.ledger.drain().sent_bytes()[world.level_name(0)]
    expected = planned.sent_bytes()[0]
    assert sent["echo"] == expected["echo"] == accumulate * 3 * 2 * 2 * 4 * (8 * 16 // 2)
    assert {name: n for name, n in sent.items() if name != "control"} == {
        name: n for name, n in expected.items() if name != "control"
    }
    roles = [op.key.role for op in planned.classes[0].ops()]
    assert roles.count("activation") == accumulate * 2 * 3
    assert all(roles[place + 1] in ("forward", "backward") for place, role in enumerate(roles) if role == "activation")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_axis_is_applied_described_and_counted(accumulate: int) -> None:
    run_world(2, _echo, accumulate)
