"""What groups send each other: coded numbers, and before them a header for each group that the message speaks for.

A header has 16 bytes: the weight of the group's contribution, and a hash of the outer state that was taken from.

From the groups' contributions of the same elements to one change. Every group computes the same bits.

Contributions come as M vectors (n,) in the order of the groups with a weight each; weight 0 leaves a group out. Means take
them one at a time, so that decoded ones need not all be in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import Codec
from thinwire.plan.rounds import HEADER_BYTES
from thinwire.plan.sync import Aggregate


def header(weight: float, digest: int, device: torch.device) -> Tensor:
    """(16,) bytes: the weight of a group's contribution, 0 to leave it out, and the hash of what it was taken from."""
    words = [torch.tensor([weight], dtype=torch.float64), torch.tensor([digest], dtype=torch.int64)]
    return torch.cat([word.view(torch.uint8) for word in words]).to(device)


@dataclass
class Outcome:
    """What came out, once the chain has run to its end."""

    change: Tensor
    """The aggregate, n elements."""
    own: Tensor | None
    """This member's contribution as the others decoded it, where it is asked for."""
    weights: dict[int, float] = field(default_factory=dict)
    """Of the contributions that count, by group; 0 for those left out."""
    diverged: list[int] = field(default_factory=list)
    """Groups that are left out because their outer state is not that of the others."""

    def count(self, headers: Tensor, members: Sequence[tuple[int, ...]]) -> list[float]:
        """Whose contributions count, of `members` whose messages began with `headers` (a row each): their weights.

        What was added up with that of a diverged group is left out with it.
        """
        groups = [group for member in members for group in member]
        words = headers.cpu().contiguous().view(len(groups), HEADER_BYTES)
        said = dict(zip(groups, words.view(torch.float64)[:, 0].tolist(), strict=True))
        digests = dict(zip(groups, words.view(torch.int64)[:, 1].tolist(), strict=True))
        self.diverged = strays({group: digests[group] for group, weight in said.items() if weight > 0})
        out = {group for member in members if set(member) & set(self.diverged) for group in member}
        self.weights = {group: 0.0 if group in out else weight for group, weight in said.items()}
        return [sum(self.weights[group] for group in member) for member in members]


def aggregate(parts_n: Iterable[Tensor], weights: Sequence[float], how: Aggregate) -> Tensor:
    """M times (n,) -> (n,).

    mean: every group that is in counts alike. tokens: by weight. median: of each coordinate, the mean of the middle two if
    M is even. trimmed: the mean without the largest and the smallest of each coordinate; the mean if fewer than 3 are in.
    All zero if every group is left out.
    """
    present = [weight for weight in weights if weight > 0]
    if how in ("median", "trimmed") and len(present) >= 3:
        kept = [part_n for part_n, weight in zip(parts_n, weights, strict=True) if weight > 0]
        sorted_Mn = torch.stack(kept).sort(dim=0).values
        drop = 1 if how == "trimmed" else (len(present) - 1) // 2
        inner_Mn = sorted_Mn[drop : len(present) - drop]
        return _mean(inner_Mn, [1.0] * len(inner_Mn))
    alike = _count_alike(weights, how)
    return _mean(parts_n, [float(weight > 0) if alike else max(0.0, weight) for weight in weights])


def aggregate_coded(coded_rc: Tensor, out_n: Tensor, weights: Sequence[float], how: Aggregate, codec: Codec) -> None:
    """`out_n` becomes the aggregate of what the rows decode to; rows that count alike are added up as they are decoded."""
    counting = [row for row, weight in enumerate(weights) if weight > 0]
    if counting and _count_alike(weights, how):
        codec.sum_into(coded_rc if len(counting) == len(weights) else coded_rc[counting], out_n)
        out_n.div_(len(counting))
    else:
        decoded = (codec.decode(coded, out_n.numel(), out_n.dtype) for coded in coded_rc)
        out_n.copy_(aggregate(decoded, weights, how))


def _count_alike(weights: Sequence[float], how: Aggregate) -> bool:
    """Whether the aggregate is the plain mean of those that are in."""
    present = [weight for weight in weights if weight > 0]
    return len(present) < 3 if how in ("median", "trimmed") else how == "mean" or len(set(present)) == 1


def _mean(parts_n: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, summed in order; equal weights divide once, so that equal contributions keep their bits if M = 2^k."""
    total: Tensor | None = None
    for part_n, weight in zip(parts_n, weights, strict=True):
        if total is None:
            like = part_n
        if weight > 0:
            total = part_n * weight if total is None else total.add_(part_n, alpha=weight)
    return torch.zeros_like(like) if total is None else total.div_(sum(weights))


def strays(digests: Mapping[int, int]) -> list[int]:
    """The groups whose digest is not that of most; of as many on each side, that with the lowest group is trusted."""
    counts: dict[int, list[int]] = {}
    for group in sorted(digests):
        counts.setdefault(digests[group], []).append(group)
    if len(counts) <= 1:
        return []
    trusted = max(counts.values(), key=lambda groups: (len(groups), -groups[0]))
    return [group for group in sorted(digests) if group not in trusted]
