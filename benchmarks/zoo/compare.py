"""What a rank saw of a training, and the first thing in it that differs from the reference."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOSS_TOLERANCE, STEP_TOLERANCE = 1e-5, 1e-3
"""Relative, of a loss; and of the largest change of a parameter over the run, the same for what is read after a step."""
REFUSALS = ("UseError", "PlanError", "ConfigError")


@dataclass
class Seen:
    """What one rank saw of a training: a loss for each micro-batch, a number for each step if the case reads one."""

    losses: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)


@dataclass
class Reference:
    """What every rank should see, and the parameters before and after; all of one replica if replicas are equal."""

    seen: list[Seen]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass
class Report:
    """How a rank's training went: nothing wrong if all three are empty."""

    error: str = ""
    """The class of what was raised."""
    message: str = ""
    differs: str = ""
    """The first thing that is not as in the reference."""

    @property
    def refused(self) -> bool:
        return self.error in REFUSALS and not self.differs


def difference(seen: Seen, ended: Mapping[str, Tensor] | None, known: Reference, rank: int) -> str:
    """The first thing that differs from the reference, in the order of the run; empty if nothing does.

    Without `ended` the run broke off: only what was seen until then is compared.
    """
    for what, ours, theirs in (
        ("loss", seen.losses, known.seen[rank].losses),
        ("number read after a step", seen.read, known.seen[rank].read),
    ):
        for number, (got, right) in enumerate(zip(ours, theirs, strict=False)):
            tolerance = LOSS_TOLERANCE if what == "loss" else STEP_TOLERANCE
            if not abs(got - right) <= tolerance * max(abs(right), 1e-3):
                return f"{what} {number}: {got:.6g}, should be {right:.6g}"
    if ended is None:
        return ""
    return parameters_differ(ended, known) or steps_missing(seen, known, rank)


def parameters_differ(ended: Mapping[str, Tensor], known: Reference) -> str:
    if set(ended) != set(known.after):
        return f"parameters {sorted(set(ended) ^ set(known.after))[:3]} are missing or new"
    worst, named = 0.0, ""
    for name, right in known.after.items():
        got, before = ended[name], known.before.get(name, torch.zeros_like(right))  # a lazy one has none before
        if got.shape != right.shape or got.dtype != right.dtype:
            return f"{name}: {tuple(got.shape)} of {got.dtype}, should be {tuple(right.shape)} of {right.dtype}"
        if right.numel() == 0 or torch.equal(got, right):
            continue
        off, moved = (got - right).abs().max().item(), (right - before).abs().max().item()
        share = off / (STEP_TOLERANCE * moved + 1e-7)
        if not share <= max(worst, 1.0):
            worst, named = share, f"{name}: off by {off:.3g}, it moved by {moved:.3g}"
    return named


def steps_missing(seen: Seen, known: Reference, rank: int) -> str:
    right = known.seen[rank]
    return "" if len(seen.losses) == len(right.losses) and len(seen.read) == len(right.read) else "a step is missing"
