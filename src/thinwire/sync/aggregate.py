"""From the groups' contributions of the same elements to one change. Every group computes the same bits.

Contributions come as (M, n) in the order of the groups with a weight each; weight 0 leaves a group out.
"""

import torch
from torch import Tensor

from thinwire.rounds.config import Aggregate


def aggregate(parts_Mn: Tensor, weights: list[float], how: Aggregate) -> Tensor:
    """(M, n) -> (n,).

    mean: every group that is in counts alike. tokens: by weight. median: of each coordinate, the mean of the middle two if
    M is even. trimmed: the mean without the largest and the smallest of each coordinate; the mean if fewer than 3 are in.
    All zero if every group is left out.
    """
    present = [m for m, weight in enumerate(weights) if weight > 0]
    if not present:
        return torch.zeros_like(parts_Mn[0])
    if how in ("median", "trimmed") and len(present) >= 3:
        sorted_Mn = parts_Mn[present].sort(dim=0).values
        drop = 1 if how == "trimmed" else (len(present) - 1) // 2
        return _mean(sorted_Mn[drop : len(present) - drop], [1.0] * (len(present) - 2 * drop))
    return _mean(parts_Mn[present], [weights[m] if how == "tokens" else 1.0 for m in present])


def _mean(parts_Mn: Tensor, weights: list[float]) -> Tensor:
    """Weighted mean, summed in order; equal weights divide once, so that equal contributions keep their bits if M = 2^k."""
    if len(set(weights)) == 1:
        weights = [1.0] * len(weights)
    total = parts_Mn[0] * weights[0] if weights[0] != 1 else parts_Mn[0].clone()
    for part_n, weight in zip(parts_Mn[1:], weights[1:], strict=True):
        total.add_(part_n, alpha=weight)
    return total.div_(sum(weights))
