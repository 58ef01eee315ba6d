"""What crosses groups: this rank's peer groups, and the exchanges of fragments with them.

No group goes more than `staleness_bound` steps ahead of the slowest one: bounded staleness (Ho et al., NeurIPS 2013).

After every step each rank tells those it exchanges with that the step is over, and waits for what they said
`staleness_bound` steps before. Groups that are a little faster than others then wait a little in every step, where a
round would have them wait for all of it in one.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import Codec, Raw, make_codec
from thinwire.comm.codecs.topk import TopK
from thinwire.comm.handle import Handle, InFlight
from thinwire.comm.world import World
from thinwire.plan.compression import returned_as
from thinwire.plan.rounds import Exchange, exchange_bytes, hops_due, inside_bytes, swaps
from thinwire.plan.sync import Sync
from thinwire.sync.exchange import check, exchange, exchange_sums, heartbeat
from thinwire.sync.fragment import Fragment
from thinwire.sync.message import Outcome, header
from thinwire.sync.peer_groups import PeerGroups, places_in
from thinwire.sync.peers import PeerGroup, digest
from thinwire.sync.pending import Part, Pending, fill, gathered, landing

Alike = Callable[[int], list[Tensor]]
"""fragment -> what all groups must hold alike of it, as vectors over its elements."""


class Links:
    """Made by all ranks together, once they have met. `groups` are those that take part."""

    def __init__(self, sync: Sync, world: World, matched: PeerGroups, fragments: Sequence[Fragment]) -> None:
        self._sync, self._world = sync, world
        self.groups = set(range(sync.groups))
        self._element_bytes = [fragment.weights.element_size() for fragment in fragments]
        owned = sorted(range_ for fragment in fragments for range_ in fragment.ranges)
        met = matched.peer_groups(owned, sync)
        self._peer_groups: list[PeerGroup] = [peers for peers, _ in met]
        self.places = [[places_in(fragment, ranges) for _, ranges in met] for fragment in fragments]
        """Of each fragment, the elements that it exchanges with each peer group."""
        self.pace = Pace(sync.staleness_bound, world)

    def bytes_of(self, fragment: int) -> int:
        """Bytes that this rank sends to ranks of other groups in one exchange of `fragment`, by the formula."""
        total = 0
        for peers, places in zip(self._peer_groups, self.places[fragment], strict=True):
            n, summed = sum(place.stop - place.start for place in places), self._summed(peers)
            element_bytes = self._element_bytes[fragment]
            total += sum(inside_bytes(n, summed=summed, element_bytes=element_bytes))
            total += exchange_bytes(
                n,
                groups=peers.size,
                codec=self._sync.codec,
                block=self._sync.block,
                element_bytes=element_bytes,
                summed=summed,
            )
        return total

    def _summed(self, peers: PeerGroup) -> int:
        return 1 if peers.inside is None else peers.inside.size

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
        for peers, places in zip(self._peer_groups, self.places[key.fragment], strict=True):
            if not places:
                continue
            part = gathered(change, places)
            own = None if whole_own is None else landing(whole_own, places)
            outcome = Outcome(landing(pending.change, places), own)
            told = digest([whole[place] for whole in state for place in places], epoch, key.round, key.fragment)
            chain = self._chain(key, part, outcome, weight, told, peers)
            pending.parts.append(Part(InFlight(chain), outcome, places))
            if whole_own is not None and own is not None:
                fill(whole_own, places, own)
        return pending

    def _chain(
        self, key: Exchange, part: Tensor, outcome: Outcome, weight: float, told: int, peers: PeerGroup
    ) -> Iterator[Handle]:
        """The hops of what one peer group exchanges: of sums, while all whose sums they are take part."""
        sync = self._sync
        how: dict[str, Any] = {
            "codec": self._codec(sync.codec, part.dtype),
            "back": self._codec(returned_as(sync.codec), part.dtype),
            "seed": (key.round * len(self.places) + key.fragment) * self._world.size + self._world.rank,
            "block": sync.block,
            "how": sync.aggregate,
            "world": self._world,
        }
        if peers.inside is not None:
            return exchange_sums(part, outcome, weight=weight, digest=told, peers=peers, **how)
        return exchange(part, outcome, headers=header(weight, told, part.device), peers=peers, **how)

    def _due(self, key: Exchange) -> list[int]:
        """Steps after which the hops of an exchange set out, but for the first. Groups that are left need fewer."""
        summed = max(map(self._summed, self._peer_groups), default=1)
        far = 1 if swaps(len(self.groups) // summed, self._sync.codec) else 2
        return [key.send + after for after in hops_due(self._sync.delay, far=far, sums=summed > 1)]

    def check(self, epoch: int, alike: Alike) -> set[int]:
        """Compare what all groups must hold alike, once more than every exchange does: the groups found diverged."""
        states = [alike(fragment) for fragment in range(len(self.places))]
        flights = []
        for number, peers in enumerate(self._peer_groups):
            parts = [
                whole[place]
                for state, places in zip(states, self.places, strict=True)
                for whole in state
                for place in places[number]
            ]
            outcome = Outcome(torch.empty(0), None)
            said = header(1.0, digest(parts, epoch), self._world.device)
            flights.append((InFlight(check(said, outcome, peers=peers, world=self._world)), outcome))
        for flight, _ in flights:
            flight.finish()
        return {group for _, outcome in flights for group in outcome.diverged}

    def keep_pace(self) -> None:
        """A step is over: wait for groups that are too far behind."""
        self.pace.keep(self._peer_groups)

    def settle(self) -> None:
        """Wait until the others have come as far, and have read what this rank has sent them."""
        self.pace.settle()
        for peers in self._peer_groups:
            if peers.inside is not None:
                peers.inside.settle()

    def drop(self, diverged: Collection[int]) -> None:
        """Exchange with the other groups alone from now on; what is in flight still counts on all."""
        self.groups -= set(diverged)
        self._peer_groups = [peers.without(diverged) for peers in self._peer_groups]

    def _codec(self, name: str, dtype: torch.dtype) -> Codec:
        if name == "topk":
            return TopK()
        if name == "fp32":
            return Raw(dtype)
        return make_codec(name, block=self._sync.block, rounding=self._sync.rounding)


class Pace:
    """What this rank has told and heard; nothing is told without a `staleness_bound`. Every rank calls `keep` after the
    same steps."""

    def __init__(self, staleness_bound: int | None, world: World) -> None:
        self._staleness_bound, self._world = staleness_bound, world
        self._told: deque[InFlight] = deque()
        self._waited_s = 0.0

    def keep(self, peer_groups: Collection[PeerGroup]) -> None:
        """A step is over: say so to `peer groups`, and wait for those that are more than `staleness_bound` steps behind."""
        if self._staleness_bound is not None:
            self._told.append(InFlight(*(heartbeat(peers=peers, world=self._world) for peers in peer_groups)))
            self._hear(self._staleness_bound)

    def settle(self) -> None:
        """Wait until everybody has come as far as this rank."""
        self._hear(0)

    def waited_s(self) -> float:
        """Seconds for which this rank has waited since it was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _hear(self, ahead: int) -> None:
        while len(self._told) > ahead:
            self._waited_s += self._told.popleft().finish()
