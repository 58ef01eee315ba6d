"""Bytes that a rank sends per optimizer step, by level and purpose, from the cut alone. Pure, no torch.

With s the fanout of a level, S the product of the fanouts up to it and N elements (padding included), an all-gather or
a reduce-scatter of the level sends b N (s-1)/S bytes from each rank, b bytes an element on the wire. Per step:

    level <= lp        gathers b_w, one reduction b_g each micro-batch
    lp < level <= lg   one reduction b_g each micro-batch, one gather b_w after the optimizer
    lg < level <= lo   one reduction b_g at the end of accumulation, one gather b_w after the optimizer
    level > lo         one reduction and one gather b_g at the end of accumulation
    a `lowrank` level  one reduction and one gather of each of its two messages, in fp32, at the end of accumulation

A unit is gathered twice a micro-batch (forward and backward); once a micro-batch if no single module spans its uses;
once a step if it is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

P_GATHER, P_REFRESH, G_REDUCE, G_GATHER = "P-gather", "P-refresh", "G-reduce", "G-gather"
SPREAD = "P-spread"
"""Masters written from outside go to their replicas; no part of a plain step."""

WireBytes = Callable[[int], int]
"""Elements of a message -> its bytes on the wire."""


@dataclass(frozen=True)
class Flow:
    """One flat buffer: its size, how its states are cut, and how often it is gathered in a step."""

    numel: int
    lp: int
    lg: int
    lo: int
    gathers: int
    trained: bool
    low_rank: tuple[int, tuple[int, int]] | None = None
    """The level whose gradient sums are of low rank, and the numbers of its two messages."""


def step_bytes(
    flow: Flow,
    fanouts: Sequence[int],
    *,
    accumulate: int,
    weights: Sequence[WireBytes],
    grads: Sequence[WireBytes],
) -> dict[int, dict[str, int]]:
    """level -> purpose -> bytes. `weights` and `grads` have a function for each level."""
    out: dict[int, dict[str, int]] = {}
    cumulative = 1
    for level, fanout in enumerate(fanouts):
        cumulative *= fanout
        if fanout == 1:
            continue
        n = flow.numel // cumulative
        sent = {
            P_GATHER: flow.gathers * (fanout - 1) * weights[level](n) if level <= flow.lp else 0,
            P_REFRESH: (fanout - 1) * weights[level](n) if flow.trained and flow.lp < level <= flow.lo else 0,
            G_REDUCE: (fanout - 1) * grads[level](n) * (accumulate if level <= flow.lg else 1) if flow.trained else 0,
            G_GATHER: (fanout - 1) * grads[level](n) if flow.trained and level > flow.lo else 0,
        }
        if flow.low_rank is not None and flow.low_rank[0] == level:
            shards = sum(-(-numbers // fanout) for numbers in flow.low_rank[1])
            sent[G_REDUCE] = sent[G_GATHER] = 4 * (fanout - 1) * shards
        out[level] = {purpose: count for purpose, count in sent.items() if count}
    return out


def total(flows: Sequence[dict[int, dict[str, int]]]) -> dict[int, dict[str, int]]:
    """Sums over flat buffers."""
    out: dict[int, dict[str, int]] = {}
    for flow in flows:
        for level, purposes in flow.items():
            for purpose, count in purposes.items():
                of_level = out.setdefault(level, {})
                of_level[purpose] = of_level.get(purpose, 0) + count
    return out
