"""An exchange in two tiers: contributions are added up, as they are, over fast links before one sum travels on slow ones.

k groups that a fast level joins, in each of h places. Every rank adds up one chunk of the changes of its k, exchanges that
with those who hold the same chunk elsewhere, coded, and gives what comes out to its k again. A place sends as many bytes as
one group would, instead of k times as many; and the contributions of a place are coded once, after they have been averaged.

The groups of a place have added up their changes before anyone can tell that one of them is astray: then the sum of that
place is left out of this exchange, all of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.collectives import all_gather, reduce_scatter
from thinwire.comm.handle import Handle
from thinwire.rounds.config import Aggregate
from thinwire.rounds.traffic import HEADER_BYTES, inside_elements
from thinwire.sync.exchange import Clique, exchange
from thinwire.sync.message import Outcome, head

SUM, SPREAD = "outer-sum", "outer-spread"
COLLECTIVES = 3
"""Inside, of one exchange. Ranks may be as many behind each other: nothing that was sent inside is written to again."""


def exchange_sums(
    change: Tensor, outcome: Outcome, *, weight: float, digest: int, clique: Clique, how: Aggregate, **across: Any
) -> Iterator[Handle]:
    """As `exchange`, for means, among the ranks of a clique with an inside; `across`: what else that one takes."""
    near, n = clique.inside, change.numel()
    assert near is not None
    assert clique.across is not None
    k, chunk = near.size, inside_elements(n, near.size)
    weight = float(weight > 0) if how == "mean" else weight
    whole = _weighted(change, weight, k * chunk)
    heads, mine = torch.empty(k, HEADER_BYTES, dtype=torch.uint8, device=change.device), change.new_empty(chunk)
    told = all_gather(heads, head(weight, digest, change.device), world=near, level=0, purpose=SUM)
    summed = reduce_scatter(mine, whole, world=near, level=0, purpose=SUM)
    yield Handle(near.outstanding, None, [told, summed])
    total = heads.cpu().view(torch.float64)[:, 0].sum().item()
    mine.div_(total or 1.0)
    inner = Outcome(torch.empty_like(mine), None)
    yield from exchange(mine, inner, heads=heads.view(-1), clique=clique.across, how="tokens", **across)
    outcome.weights, outcome.astray = inner.weights, inner.astray
    target = outcome.change if k * chunk == n else change.new_empty(k * chunk)
    yield all_gather(target, inner.change, world=near, level=0, purpose=SPREAD)
    if target is not outcome.change:
        outcome.change.copy_(target[:n])


def _weighted(change_n: Tensor, weight: float, size: int) -> Tensor:
    """`weight` times the change, zeros up to `size`; of a contribution that is left out nothing, not even a NaN."""
    if weight == 0:
        return change_n.new_zeros(size)
    weighted = change_n if weight == 1 else change_n * weight
    return weighted if size == len(weighted) else torch.nn.functional.pad(weighted, (0, size - len(weighted)))
