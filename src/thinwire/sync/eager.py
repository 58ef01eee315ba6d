"""Eager updates (arXiv 2502.12996): the last round's mean change, with a group's own part of it replaced by its newest.

With all M groups in, g = mean + (fresh - own) / M. A contribution of weight 0 is in neither the mean nor the count.
"""

import torch
from torch import Tensor


def replace_own(
    mean: Tensor, own: Tensor, fresh: Tensor, *, others: int, own_counts: bool, fresh_counts: bool
) -> Tensor:
    """(n,) each: the mean over what `others` other groups sent last and what this group has now.

    `mean` is of the others and, if `own_counts`, of this group's `own` last contribution; `fresh` is its newest, which may
    not count either. All zero if nothing counts.
    """
    total = mean * (others + own_counts)
    if own_counts:
        total.sub_(own)
    if fresh_counts:
        total.add_(fresh)
    count = others + fresh_counts
    return total.div_(count) if count else torch.zeros_like(total)
