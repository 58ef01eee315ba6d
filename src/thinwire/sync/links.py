"""What crosses groups: this rank's cliques, and the exchanges of fragments with them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.codecs import make_codec
from thinwire.comm.flight import Flight
from thinwire.comm.handle import Handle
from thinwire.comm.topk import TopK
from thinwire.comm.world import World
from thinwire.rounds.config import Sync
from thinwire.rounds.schedule import Exchange, hops_due
from thinwire.rounds.traffic import exchange_bytes, inside_bytes, swaps
from thinwire.sync.exchange import Clique, check, exchange
from thinwire.sync.fragment import Fragment
from thinwire.sync.identity import digest
from thinwire.sync.meeting import Meeting, places_in
from thinwire.sync.message import Coder, Outcome, Raw, head
from thinwire.sync.pace import Pace
from thinwire.sync.pending import Part, Pending, fill, gathered, landing
from thinwire.sync.summed import exchange_sums
from thinwire.wire import returned_as

Alike = Callable[[int], list[Tensor]]
"""fragment -> what all groups must hold alike of it, as vectors over its elements."""


class Links:
    """Made by all ranks together, once they have met. `groups` are those that take part."""

    def __init__(self, sync: Sync, world: World, meeting: Meeting, fragments: Sequence[Fragment]) -> None:
        self._sync, self._world = sync, world
        self.groups = set(range(sync.groups))
        self._element_bytes = [fragment.weights.element_size() for fragment in fragments]
        owned = sorted(range_ for fragment in fragments for range_ in fragment.ranges)
        met = meeting.cliques(owned, sync)
        self._cliques: list[Clique] = [clique for clique, _ in met]
        self.places = [[places_in(fragment, ranges) for _, ranges in met] for fragment in fragments]
        """Of each fragment, the elements that it exchanges with each clique."""
        self.pace = Pace(sync.lead, world)

    def bytes_of(self, fragment: int) -> int:
        """Bytes that this rank sends to ranks of other groups in one exchange of `fragment`, by the formula."""
        total = 0
        for clique, places in zip(self._cliques, self.places[fragment], strict=True):
            n, summed = sum(place.stop - place.start for place in places), self._summed(clique)
            element_bytes = self._element_bytes[fragment]
            total += sum(inside_bytes(n, summed=summed, element_bytes=element_bytes))
            total += exchange_bytes(
                n,
                groups=clique.size,
                codec=self._sync.codec,
                block=self._sync.block,
                element_bytes=element_bytes,
                summed=summed,
            )
        return total

    def _summed(self, clique: Clique) -> int:
        return 1 if clique.inside is None else clique.inside.size

    def send(self, key: Exchange, change: Tensor, *, weight: float, epoch: int, alike: Alike) -> Pending:
        """Start the exchange `key` of this rank's `change` (n,); a contribution of `weight` 0 is left out."""
        sync = self._sync
        whole_own = torch.empty_like(change) if sync.error_feedback or sync.own_fresh else None
        pending = Pending(
            key,
            torch.empty_like(change),
            whole_own,
            epoch=epoch,
            groups=len(self.groups),
            weight=weight,
            sent_bytes=self.bytes_of(key.fragment),
            due=self._due(key),
        )
        state = alike(key.fragment)
        for clique, places in zip(self._cliques, self.places[key.fragment], strict=True):
            if not places:
                continue
            part = gathered(change, places)
            own = None if whole_own is None else landing(whole_own, places)
            outcome = Outcome(landing(pending.change, places), own)
            told = digest([whole[place] for whole in state for place in places], epoch, key.round, key.fragment)
            chain = self._chain(key, part, outcome, weight, told, clique)
            pending.parts.append(Part(Flight(chain), outcome, places))
            if whole_own is not None and own is not None:
                fill(whole_own, places, own)
        return pending

    def _chain(
        self, key: Exchange, part: Tensor, outcome: Outcome, weight: float, told: int, clique: Clique
    ) -> Iterator[Handle]:
        """The hops of what one clique exchanges: of sums, while all whose sums they are take part."""
        sync = self._sync
        how: dict[str, Any] = {
            "codec": self._codec(sync.codec, key, part.dtype),
            "back": self._codec(returned_as(sync.codec), key, part.dtype),
            "block": sync.block,
            "how": sync.aggregate,
            "world": self._world,
        }
        if clique.inside is not None:
            return exchange_sums(part, outcome, weight=weight, digest=told, clique=clique, **how)
        return exchange(part, outcome, heads=head(weight, told, part.device), clique=clique, **how)

    def _due(self, key: Exchange) -> list[int]:
        """Steps after which the hops of an exchange set out, but for the first. Groups that are left need fewer."""
        summed = max(map(self._summed, self._cliques), default=1)
        far = 1 if swaps(len(self.groups) // summed, self._sync.codec) else 2
        return [key.send + after for after in hops_due(self._sync.delay, far=far, sums=summed > 1)]

    def check(self, epoch: int, alike: Alike) -> set[int]:
        """Compare what all groups must hold alike, once more than every exchange does: the groups found astray."""
        states = [alike(fragment) for fragment in range(len(self.places))]
        flights = []
        for number, clique in enumerate(self._cliques):
            parts = [
                whole[place]
                for state, places in zip(states, self.places, strict=True)
                for whole in state
                for place in places[number]
            ]
            outcome = Outcome(torch.empty(0), None)
            said = head(1.0, digest(parts, epoch), self._world.device)
            flights.append((Flight(check(said, outcome, clique=clique, world=self._world)), outcome))
        for flight, _ in flights:
            flight.land()
        return {group for _, outcome in flights for group in outcome.astray}

    def keep_pace(self) -> None:
        """A step is over: wait for groups that are too far behind."""
        self.pace.keep(self._cliques)

    def settle(self) -> None:
        """Wait until the others have come as far, and have read what this rank has sent them."""
        self.pace.settle()
        for clique in self._cliques:
            if clique.inside is not None:
                clique.inside.settle()

    def drop(self, astray: Collection[int]) -> None:
        """Exchange with the other groups alone from now on; what is in flight still counts on all."""
        self.groups -= set(astray)
        self._cliques = [clique.without(astray) for clique in self._cliques]

    def _codec(self, name: str, key: Exchange, dtype: torch.dtype) -> Coder:
        """A codec for one exchange, with a salt of its own."""
        if name == "topk":
            return TopK()
        if name == "fp32":
            return Raw(dtype)
        codec = make_codec(name, block=self._sync.block, rounding=self._sync.rounding)
        codec.salt = (key.round * len(self.places) + key.fragment) * self._world.size + self._world.rank
        return codec
