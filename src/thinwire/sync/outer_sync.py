"""Outer synchronisation: worker groups train on their own and agree on one fragment after the other, behind the steps.

Four separate parts: when (`rounds.schedule`, a pure function of the step), how precisely (`comm.codecs`), with whom and
how (`cliques`, `exchange`), and what is made of it (`outer`). Any partition inside the groups: each rank exchanges the
elements it stands for directly with the ranks of the other groups that stand for the same ones, K flows side by side,
and what it gets goes to its group's replicas over the fast links.

Work is keyed by (epoch of membership, round, fragment). A contribution of weight 0 is left out of the aggregate; nothing
a group did locally depends on the others' answers until a round is applied.
"""

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.comm.codecs import make_codec
from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.flight import Flight
from thinwire.comm.topk import TopK
from thinwire.comm.world import World
from thinwire.errors import PlanError, SyncError
from thinwire.partition.engine import Sharded
from thinwire.rounds.config import Sync
from thinwire.rounds.fragments import deal, fragment_count
from thinwire.rounds.schedule import Exchange, Schedule
from thinwire.rounds.traffic import exchange_bytes, swaps
from thinwire.sync.cliques import Range, find_cliques, meet
from thinwire.sync.exchange import RETURN, SEND, Clique, Coder, Outcome, Raw, exchange
from thinwire.sync.fragment import Fragment
from thinwire.sync.identity import compare, digest, fingerprint
from thinwire.sync.outer import mix_into, outer_step


@dataclass(frozen=True)
class Round:
    """What became of one exchange, for the log."""

    epoch: int
    round: int
    fragment: int
    send: int
    apply: int
    stall_s: float
    """How long this rank waited for it when it was due."""
    sent_bytes: int
    groups: int
    """How many groups' contributions it holds."""


@dataclass
class Pending:
    """An exchange in flight, or landed and not applied."""

    key: Exchange
    change: Tensor
    """The aggregate, filled as the cliques' parts land."""
    own: Tensor
    """This rank's contribution as the others decoded it."""
    flights: list[tuple[Flight, Outcome]] = field(default_factory=list)
    places: list[list[slice]] = field(default_factory=list)
    sent_bytes: int = 0
    groups: int = 0
    on_second_hop: bool = False
    stall_s: float = 0.0
    """Seconds for which training stood still because it was late."""

    def advance(self) -> None:
        """Issue the second hop; waits for the first if it is late."""
        start_s = time.perf_counter()
        for flight, _ in self.flights:
            flight.advance()
        self.on_second_hop = True
        self.stall_s += time.perf_counter() - start_s

    def land(self) -> None:
        """Wait for all of it."""
        start_s = time.perf_counter()
        for flight, _ in self.flights:
            flight.land()
        self.stall_s += time.perf_counter() - start_s


class OuterSync:
    """Make it after `shard(module, plan, world.inside(level))`; call `after(step)` after each optimizer step.

    `groups` lists the ranks of every group; by default the groups are the members of the world's outermost level. `same`
    says what else must be equal in all groups, by name (plan, tokenizer, corpus). Raises PlanError where `sync` does not
    fit the model or the world, ConfigError if the groups do not start from the same weights and `same`.
    """

    def __init__(
        self,
        engine: Sharded,
        sync: Sync,
        world: World,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        same: Mapping[str, str] | None = None,
    ) -> None:
        self.engine, self.sync, self.world = engine, sync, world
        self.epoch, self.step = 0, 0
        inner = engine.world.size
        self.groups = groups or [range(first, first + inner) for first in range(0, world.size, inner)]
        if len(self.groups) != sync.groups:
            raise PlanError(f"sync is for {sync.groups} groups, this world has {len(self.groups)}")
        self.group = next(number for number, ranks in enumerate(self.groups) if world.rank in ranks)
        self.fragments = self._fragments()
        self.schedule: Schedule = sync.schedule(len(self.fragments))
        self._cliques = self._meet(dict(same or {}))
        self._pending: deque[Pending] = deque()
        self.tokens = torch.zeros(len(self.fragments), dtype=torch.float64)
        """Trained on since the last send of each fragment: the weight of its next contribution."""

    def _fragments(self) -> list[Fragment]:
        shares = self.engine.shares()
        units: dict[int, tuple[str, int]] = {}
        for share in shares:
            used = sum(flat.layout.used for flat in self.engine.units[share.unit].flats if flat.trained)
            units[share.unit] = (share.unit_name, used)
        blocks = sum(name.rpartition(".")[2].isdigit() for name, _ in units.values())
        indices = list(units)
        dealt = deal(list(units.values()), fragment_count(self.sync.fragments, blocks), self.sync.order)
        chosen = [[indices[position] for position in positions] for positions in dealt]
        return [
            Fragment(own, [share for share in shares if share.unit in own], feedback=self.sync.error_feedback)
            for own in chosen
        ]

    # -- meeting -------------------------------------------------------------------------------------------------------

    def _meet(self, same: dict[str, str]) -> list[list[tuple[Clique, list[slice]]]]:
        """Compare what every group starts from; for each fragment the cliques of this rank and their elements."""
        layout = [
            (slot.name, slot.shape, str(flat.master.dtype))
            for unit in self.engine.units
            for flat in unit.flats
            for slot in flat.layout.slots
        ]
        mine = {"parameters": str(layout), "sync": self.sync.model_dump_json(), **same, "weights": self._weights_hash()}
        own = ({what: f"{digest([], value):x}" for what, value in mine.items()}, self._ranges())
        everyone = [own]
        if self.world.size > 1:
            everyone = [own] * self.world.size
            dist.all_gather_object(everyone, own, group=dist.new_group(backend="gloo"))
        ranks = [rank for group in self.groups for rank in group]
        compare([everyone[rank][0] for rank in ranks], [n for n, group in enumerate(self.groups) for _ in group])
        cliques = find_cliques([[(rank, everyone[rank][1]) for rank in group] for group in self.groups])
        memberships = Counter(rank for clique in cliques for rank in clique)
        one_each = all(memberships[rank] == 1 for rank in ranks)
        made = [(self._clique(ranks, one_each), ranges) for ranks, ranges in cliques.items()]
        belongs = [(clique, ranges) for clique, ranges in made if clique is not None]
        return [self._places(fragment, belongs) for fragment in self.fragments]

    def _ranges(self) -> list[Range]:
        return sorted(range_ for fragment in self.fragments for range_ in fragment.ranges)

    def _weights_hash(self) -> str:
        """Of all initial weights of the group, however they are cut."""
        shares = [share for fragment in self.fragments for share in fragment.shares]
        total = torch.tensor([sum(fingerprint(share.master, share.start) for share in shares)], dtype=torch.float64)
        all_reduce_small(total, world=self.engine.world, op="sum")
        return str(total.item())

    def _clique(self, ranks: tuple[int, ...], one_each: bool) -> Clique | None:
        """The clique of `ranks` with its communicators; None if this rank is not in it."""
        belongs, kinds = self.world.rank in ranks, (SEND, RETURN) if len(ranks) > 1 else ()
        if one_each and not belongs:
            return None
        made = {kind: self.world.communicator(ranks, members_only=one_each) for kind in kinds}
        return Clique(ranks.index(self.world.rank), len(ranks), made) if belongs else None

    def _places(
        self, fragment: Fragment, cliques: list[tuple[Clique, list[Range]]]
    ) -> list[tuple[Clique, list[slice]]]:
        """Where in the fragment's vector the elements of each clique are."""
        found, base = [], {}
        at = 0
        for start, end in fragment.ranges:
            base[start, end] = at - start
            at += end - start
        for clique, ranges in cliques:
            met = [(a + base[mine], b + base[mine]) for mine in fragment.ranges for a, b in meet([mine], ranges)]
            if met:
                found.append((clique, _merged(met)))
        return found

    def bytes_of(self, fragment: int) -> int:
        """Bytes that this rank sends across groups in one exchange of `fragment`, by the formula."""
        element_bytes = self.fragments[fragment].weights.element_size()
        return sum(
            exchange_bytes(
                sum(place.stop - place.start for place in places),
                groups=clique.size,
                codec=self.sync.codec,
                block=self.sync.block,
                element_bytes=element_bytes,
            )
            for clique, places in self._cliques[fragment]
        )

    # -- the loop's one call -------------------------------------------------------------------------------------------

    def after(self, step: int, *, tokens: float = 1.0) -> list[Round]:
        """Step `step` (counted from 1) is over: send, advance and apply what the schedule says.

        `tokens` is what this group trained on in the step; contributions are weighted with it if the aggregate asks for
        it. Returns the rounds applied. Raises SyncError if this group's outer state is not that of the others.
        """
        assert step == self.step + 1, f"step {step} comes after {self.step}: the schedule follows committed steps"
        self.step = step
        self.tokens += tokens
        self._advance(step)
        applied = []
        sent, due = self.schedule.sent_after(step), self.schedule.applied_after(step)
        if sent is not None:
            self._send(sent)
            if self.sync.own_fresh:
                applied.append(self._apply_fresh(sent))
        if due is not None and not self.sync.own_fresh and self._pending and self._pending[0].key == due:
            applied.append(self._apply(self._pending.popleft()))
        self._fetch_next(step + 1)
        return applied

    def _advance(self, step: int) -> None:
        """Second hops, where the form has them, set out halfway to applying, on all ranks in the same order.

        Backends do not tell reliably whether something has come (gloo's sends and receives are "not completed" until
        waited for), so the time is fixed by the schedule instead.
        """
        if swaps(self.sync.groups, self.sync.codec):
            return
        for pending in self._pending:
            if not pending.on_second_hop and step >= pending.key.send + (self.schedule.delay + 1) // 2:
                pending.advance()

    def _fetch_next(self, step: int) -> None:
        """Start bringing the outer state that the next step needs to the device."""
        for due in (self.schedule.sent_after(step), self.schedule.applied_after(step)):
            if due is not None:
                self.fragments[due.fragment].fetch()

    # -- sending -------------------------------------------------------------------------------------------------------

    def _send(self, key: Exchange) -> None:
        fragment = self.fragments[key.fragment]
        change = fragment.change()
        if fragment.residual is not None:
            change.add_(fragment.residual.to(change.device), alpha=self.sync.feedback_decay)
        pending = Pending(
            key, torch.zeros_like(change), torch.zeros_like(change), sent_bytes=self.bytes_of(key.fragment)
        )
        for clique, places in self._cliques[key.fragment]:
            part = torch.cat([change[place] for place in places])
            outcome = Outcome(torch.empty_like(part), torch.empty_like(part))
            chain = exchange(
                part,
                outcome,
                weight=float(self.tokens[key.fragment]),
                digest=self._digest(key, places),
                clique=clique,
                codec=self._codec(key, part.dtype),
                block=self.sync.block,
                how=self.sync.aggregate,
                world=self.world,
                level=self.sync.level,
            )
            pending.flights.append((Flight(chain), outcome))
            pending.places.append(places)
            _fill(pending.own, places, outcome.own)
        if fragment.residual is not None:
            fragment.residual.copy_(change.sub_(pending.own))
        self.tokens[key.fragment] = 0.0
        self._pending.append(pending)

    def _digest(self, key: Exchange, places: list[slice]) -> int:
        """Of the outer state that this exchange starts from; eager updates keep one for each group, not comparable."""
        if self.sync.own_fresh:
            return 0
        fragment = self.fragments[key.fragment]
        state = [whole[place] for whole in (fragment.weights, fragment.momentum) for place in places]
        return digest(state, self.epoch, key.round, key.fragment)

    def _codec(self, key: Exchange, dtype: torch.dtype) -> Coder:
        """A codec for one exchange, with a salt of its own."""
        if self.sync.codec == "topk":
            return TopK()
        if self.sync.codec == "fp32":
            return Raw(dtype)
        codec = make_codec(self.sync.codec, block=self.sync.block, rounding=self.sync.rounding)
        codec.salt = (key.round * len(self.fragments) + key.fragment) * self.world.size + self.world.rank
        return codec

    # -- applying ------------------------------------------------------------------------------------------------------

    def _land(self, pending: Pending) -> None:
        """Wait for what has not come. Raises SyncError if this group's state is astray."""
        pending.land()
        for (_, outcome), places in zip(pending.flights, pending.places, strict=True):
            _fill(pending.change, places, outcome.change)
            pending.groups = sum(weight > 0 for weight in outcome.weights)
            if self.group in outcome.astray:
                raise SyncError(
                    f"group {self.group}: its outer weights or momentum of fragment {pending.key.fragment} are not those of "
                    f"the other groups before round {pending.key.round}; it stops, start it again from a checkpoint"
                )
        pending.flights, pending.places = [], []

    def _apply(self, pending: Pending) -> Round:
        """The outer step of a fragment, and the group's own weights mixed with what comes out."""
        self._land(pending)
        return self._step(pending, pending.change)

    def _step(self, pending: Pending, change: Tensor) -> Round:
        fragment = self.fragments[pending.key.fragment]
        weights, momentum = fragment.take()
        rms = self._rms(fragment, momentum) if self.sync.gap_penalty else None
        outer_step(weights, momentum, change, self.sync, rms=rms)
        fragment.put(weights, momentum)
        self._write(fragment, weights, self.sync.mix)
        key = pending.key
        return Round(
            self.epoch,
            key.round,
            key.fragment,
            key.send,
            self.step,
            pending.stall_s,
            pending.sent_bytes,
            pending.groups,
        )

    def _apply_fresh(self, key: Exchange) -> Round:
        """Eager updates (arXiv 2502.12996): the last mean change, but this group's own part is its newest."""
        newest = self._pending[-1]
        last = self._pending.popleft() if len(self._pending) > 1 else None
        if last is not None:
            self._land(last)
        fragment = self.fragments[key.fragment]
        change = fragment.change().div_(self.sync.groups)
        if last is not None:
            change.add_(last.change).sub_(last.own, alpha=1 / self.sync.groups)
        return self._step(last or newest, change)

    def _rms(self, fragment: Fragment, momentum: Tensor) -> float:
        """Root mean square over the fragment, all ranks of the group together; rounded so that any cut gives the same."""
        sums = torch.tensor([momentum.double().square().sum().item(), fragment.numel], dtype=torch.float64)
        all_reduce_small(sums, world=self.engine.world, op="sum")
        squares, count = sums.tolist()
        return float(torch.tensor((squares / max(1.0, count)) ** 0.5, dtype=torch.float32))

    def _write(self, fragment: Fragment, weights: Tensor, mix: float) -> None:
        with self.engine.rewriting(fragment.units):
            for share, outer in zip(fragment.shares, fragment.split(weights), strict=True):
                mix_into(share.master, outer, mix)

    # -- the outer weights ---------------------------------------------------------------------------------------------

    def settle(self) -> list[Round]:
        """At the end of a run: apply what is still in flight now, so that nothing that was sent is lost."""
        applied = []
        while self._pending and not self.sync.own_fresh:
            applied.append(self._apply(self._pending.popleft()))
        for pending in self._pending:
            self._land(pending)
        return applied

    @property
    def pending(self) -> Sequence[Pending]:
        """What was sent and is not applied, oldest first."""
        return tuple(self._pending)

    def start_here(self) -> None:
        """The masters were written from outside before the first step: the outer weights are these."""
        for fragment in self.fragments:
            fragment.weights.copy_(torch.cat([share.master for share in fragment.shares]))

    def go_on(self, step: int, *, flights: Collection[int]) -> None:
        """Go on after `step`. What was in flight then of the fragments `flights` waits for its values to be read."""
        self.step = step
        self._pending.clear()
        for key in self.schedule.in_flight(step):
            if key.fragment not in flights:
                continue
            like = self.fragments[key.fragment].shares[0].master.new_zeros(self.fragments[key.fragment].numel)
            self._pending.append(Pending(key, like, like.clone(), groups=self.sync.groups, on_second_hop=True))

    def drain(self) -> None:
        """Wait for everything in flight without applying it."""
        for pending in self._pending:
            self._land(pending)

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Inside, the model computes with the outer weights, which score better than any group's own (2501.18512)."""
        kept = [[share.master.clone() for share in fragment.shares] for fragment in self.fragments]
        self._show([fragment.split(fragment.weights) for fragment in self.fragments])
        try:
            yield
        finally:
            self._show(kept)

    def _show(self, values: Sequence[Sequence[Tensor]]) -> None:
        for fragment, parts in zip(self.fragments, values, strict=True):
            with self.engine.rewriting(fragment.units, exact=True):
                for share, part in zip(fragment.shares, parts, strict=True):
                    share.master.copy_(part)
        self.engine.drain()


def _merged(ranges: list[Range]) -> list[slice]:
    """Ascending ranges as slices, neighbours joined."""
    out: list[Range] = []
    for start, end in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return [slice(start, end) for start, end in out]


def _fill(target: Tensor, places: Sequence[slice], values: Tensor) -> None:
    """Spread `values` over the places of `target`."""
    at = 0
    for place in places:
        size = place.stop - place.start
        target[place] = values[at : at + size]
        at += size
