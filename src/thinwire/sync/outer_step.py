"""What is made of a fragment's aggregate: the outer step, and the group's own weights mixed with what comes out.

The outer step: from the groups' mean change of a fragment to its next outer weights. Plain tensors, no communication.

v <- mu v + g, then theta <- theta - lr (g + mu v) with Nesterov momentum, theta - lr v without, in the order of
operations of torch.optim.SGD. g is a change "before minus after", so it points uphill like a gradient.

Eager updates (arXiv 2502.12996): the last round's mean change, with a group's own part of it replaced by its newest.

With all M groups in, g = mean + (fresh - own) / M. A contribution of weight 0 is in neither the mean nor the count.
"""

import torch
from torch import Tensor

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.plan.sync import Sync
from thinwire.sync.fragment import Fragment, Replica
from thinwire.sync.pending import Pending


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


_CPU_CHUNK = 1 << 17
"""Elements at a time: what the step makes of them is in the processor's cache when they are mixed."""


def apply_change(engine: Replica, fragment: Fragment, change: Tensor, sync: Sync) -> None:
    """Step the outer weights and momentum with `change` (n,), which is used up, and mix. All ranks of the group together."""
    weights, momentum = fragment.take()
    rms = _rms(momentum, engine.world) if sync.gap_penalty else None
    at_a_time = _CPU_CHUNK if weights.device.type == "cpu" else max(1, weights.numel())
    split = [fragment.split(values) for values in (weights, momentum, change)]
    with engine.rewriting(fragment.units):
        for share, *outer in zip(fragment.shares, *split, strict=True):
            chunks = [torch.split(values, at_a_time) for values in (share.master, *outer)]
            for local_c, weights_c, momentum_c, change_c in zip(*chunks, strict=True):
                outer_step(weights_c, momentum_c, change_c, sync, rms=rms)
                mix_into(local_c, weights_c, sync.mix)
    fragment.put(weights, momentum)


def restart(engine: Replica, fragment: Fragment, sync: Sync) -> None:
    """Mix with the outer weights as they are: there is nothing to apply, but what was just sent must not be sent again."""
    weights, _ = fragment.take()
    with engine.rewriting(fragment.units):
        for share, outer in zip(fragment.shares, fragment.split(weights), strict=True):
            mix_into(share.master, outer, sync.mix)


def _rms(momentum: Tensor, group: World) -> float:
    """Root mean square over the fragment, all ranks of the group together; rounded so that any partition gives the same."""
    sums = torch.tensor([momentum.double().square().sum().item(), momentum.numel()], dtype=torch.float64)
    all_reduce_small(sums, world=group, op="sum")
    squares, count = sums.tolist()
    return float(torch.tensor((squares / max(1.0, count)) ** 0.5, dtype=torch.float32))


def fresh_change(last: Pending, fresh: Tensor, *, group: int, fresh_counts: bool) -> Tensor:
    """(n,): what `group` applies of `last`, which has landed, and of its newest change `fresh`."""
    assert last.own is not None
    change = torch.empty_like(fresh)
    for places, weights in last.counted:
        own_counts = bool(weights[group] > 0)
        others = int((weights > 0).sum()) - own_counts
        for place in places:
            change[place] = _mean(
                last.change[place] * (others + own_counts),
                last.own[place] if own_counts else None,
                fresh[place] if fresh_counts else None,
                others=others,
            )
    return change


def _mean(total: Tensor, own: Tensor | None, fresh: Tensor | None, *, others: int) -> Tensor:
    """Of what `others` sent last, in `total` with this group's `own`, and of what it has now; zero if nothing counts."""
    if own is not None:
        total.sub_(own)
    if fresh is not None:
        total.add_(fresh)
    count = others + (fresh is not None)
    return total.div_(count) if count else torch.zeros_like(total)
