"""The outer step: from the groups' mean change of a fragment to its next outer weights. Plain tensors, no communication.

v <- mu v + g, then theta <- theta - lr (g + mu v) with Nesterov momentum, theta - lr v without, in the order of
operations of torch.optim.SGD. g is a change "before minus after", so it points uphill like a gradient.
"""

import torch
from torch import Tensor

from thinwire.rounds.config import Sync


def outer_step(weights: Tensor, momentum: Tensor, change: Tensor, sync: Sync, *, rms: float | None = None) -> None:
    """Update `weights` and `momentum` in place; `change` is used up.

    `rms`: root mean square of `momentum` over the whole fragment, for the gap penalty.
    """
    if sync.gap_penalty:
        assert rms is not None
        change.div_(staleness_gap(momentum, rms))
    momentum.mul_(sync.outer_momentum).add_(change)
    if sync.clip is not None:
        momentum.clamp_(-sync.clip, sync.clip)
    step = change.add_(momentum, alpha=sync.outer_momentum) if sync.nesterov else momentum
    weights.add_(step, alpha=-sync.outer_lr)


def staleness_gap(momentum: Tensor, rms: float) -> Tensor:
    """By how much to divide a change that is one round old, element by element; at least 1.

    CO2 (arXiv 2401.16265) divides by 1 + a normalised distance between the weights now and those that the change
    started from. Without Nesterov that distance is lr |v|: the last outer step. It is normalised by its own root mean
    square over the fragment, as Gap-Aware (1909.10802) normalises by the average step: nothing moved gives 1, a uniform
    move 2 everywhere, and where the weights ran far ahead the old change counts less. The factor lr cancels.
    """
    return momentum.abs() / rms + 1 if rms > 0 else torch.ones_like(momentum)


def mix_into(local: Tensor, outer: Tensor, mix: float) -> None:
    """local <- mix local + (1 - mix) outer, in place; a copy, bit for bit, for mix = 0."""
    if mix == 0:
        local.copy_(outer)
    elif mix < 1:
        local.mul_(mix).add_(outer.to(local.device), alpha=1 - mix)
