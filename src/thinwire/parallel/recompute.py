"""Activation recompute (arXiv 1604.06174): keep only each block's input, run the block again in backward."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


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
