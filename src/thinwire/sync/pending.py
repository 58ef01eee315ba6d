"""What is under way: an exchange of one fragment with all peer groups of this rank, from its sending to its applying."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.comm.handle import InFlight
from thinwire.plan.rounds import Exchange
from thinwire.sync.message import Outcome


@dataclass(frozen=True)
class Round:
    """What became of one exchange, for the log."""

    epoch: int
    round: int
    fragment: int
    send: int
    apply: int
    stall_s: float
    """How long this rank waited for it when it was due, and since the round before for groups too far behind."""
    sent_bytes: int
    groups: int
    """How many groups' contributions it holds."""


@dataclass
class Part:
    """What one peer group exchanges of it."""

    flight: InFlight
    outcome: Outcome
    places: list[slice]
    """Its elements in the fragment's vector."""


@dataclass
class Pending:
    """An exchange in flight, or landed and not applied."""

    key: Exchange
    change: Tensor
    """The aggregate, filled as the peer groups' parts land."""
    own: Tensor | None
    """This rank's contribution as the others decoded it, where error feedback or eager updates need it."""
    epoch: int
    groups: int
    """How many groups take part; once it has landed, how many count everywhere."""
    parts: list[Part] = field(default_factory=list)
    counted: list[tuple[list[slice], Tensor]] = field(default_factory=list)
    """Weights (groups,) of the contributions that `change` holds at these places, once it has landed."""
    weight: float = 1.0
    """Of this group's own contribution."""
    sent_bytes: int = 0
    due: list[int] = field(default_factory=list)
    """Steps after which its next hop sets out, the one after that, and so on."""
    landed: bool = False
    stall_s: float = 0.0
    """Seconds for which this rank waited for messages that were late, without what it makes of them."""

    def advance(self, step: int) -> None:
        """Issue the hops that are due after `step`; waits for those before them if they are late."""
        while self.due and step >= self.due[0]:
            self.due.pop(0)
            for part in self.parts:
                self.stall_s += part.flight.advance()

    def land(self) -> set[int]:
        """Wait for all of it and take it in: the groups that a peer group of this rank found diverged."""
        diverged: set[int] = set()
        for part in self.parts:
            self.stall_s += part.flight.finish()
            weights = part.outcome.weights
            self.groups = min(self.groups, sum(weight > 0 for weight in weights.values()))
            fill(self.change, part.places, part.outcome.change)
            by_group = torch.zeros(max(weights) + 1, dtype=torch.float64)
            for group, weight in weights.items():
                by_group[group] = weight
            self.counted.append((part.places, by_group))
            diverged |= set(part.outcome.diverged)
        self.parts, self.landed = [], True
        return diverged


def gathered(values: Tensor, places: Sequence[slice]) -> Tensor:
    """The places of `values` back to back; of one place no copy is made."""
    return values[places[0]] if len(places) == 1 else torch.cat([values[place] for place in places])


def landing(target: Tensor, places: Sequence[slice]) -> Tensor:
    """Where to put what `fill` spreads over the places of `target`: the one place itself, else memory beside it."""
    return target[places[0]] if len(places) == 1 else target.new_empty(sum(p.stop - p.start for p in places))


def fill(target: Tensor, places: Sequence[slice], values: Tensor) -> None:
    """Spread `values`, which lie in what `landing` gave, over the places of `target`."""
    if len(places) == 1:
        return
    at = 0
    for place in places:
        size = place.stop - place.start
        target[place] = values[at : at + size]
        at += size
