"""The one visible order in which a plan is applied to a model that knows nothing of it."""

import torch
from torch import nn

from thinwire.comm.world import World
from thinwire.parallel.recompute import apply_recompute
from thinwire.partition.engine import Sharded, shard
from thinwire.plan import Plan


def apply_plan(model: nn.Module, plan: Plan, world: World, *, compile_blocks: bool = False) -> Sharded:
    """recompute -> compile -> partition. `model.blocks` are its transformer blocks.

    Compiling comes after recompute so that the recomputed region is compiled too. Only the blocks' forward is compiled,
    not the hooks around it, so the collectives stay outside the compiled graphs.
    """
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    if plan.recompute == "full":
        apply_recompute(blocks)
    if compile_blocks:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    return shard(model, plan, world)
