"""The one visible order in which a plan is applied to a model that knows nothing of it.

Activation recompute (arXiv 1604.06174): keep only each block's input, run the block again in backward.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.parallel.shard.deferred import Initial
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.plan.plan import Plan


def apply_plan(
    model: nn.Module, plan: Plan, world: World, *, compile_blocks: bool = False, initial: Initial | None = None
) -> Sharded:
    """recompute -> compile -> partition. Raises PlanError if the model has no list of blocks.

    Compiling comes after recompute so that the recomputed region is compiled too. Only the blocks' forward is compiled,
    not the hooks around it, so the collectives stay outside the compiled graphs.
    """
    blocks = blocks_of(model)
    if plan.recompute == "full":
        apply_recompute(blocks)
    if compile_blocks:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    return shard(model, plan, world, initial=initial)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of the model's transformer blocks: of all its lists the one that holds the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise PlanError(f"{type(model).__name__} has no ModuleList of blocks, so there is nothing to shard it along")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def apply_recompute(blocks: nn.ModuleList) -> None:
    """Make every block of `blocks` recompute its activations in backward. Gradients are unchanged, bit for bit.

    The block's class and parameter names stay as they are: only its `forward` is wrapped. Outside training (no
    gradients wanted) the wrapped forward is the plain one.
    """
    for block in blocks:
        _wrap(block)


def _wrap(block: nn.Module) -> None:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    block.forward = forward
