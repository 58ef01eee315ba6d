"""Eager updates (arXiv 2502.12996): the last round's mean change, with a group's own part of it replaced by its newest.

With all M groups in, g = mean + (fresh - own) / M. A contribution of weight 0 is in neither the mean nor the count.
"""

import torch
from torch import Tensor

from thinwire.sync.pending import Pending


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
