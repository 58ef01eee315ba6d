"""Outer synchronisation: worker groups train on their own and agree on one fragment after the other, behind the steps.

Four separate parts: when (`rounds.schedule`, a pure function of the step), how precisely (`comm.codecs`), with whom and
how (`cliques`, `exchange`), and what is made of it (`outer`). Any partition inside the groups: each rank exchanges the
elements it stands for directly with the ranks of the other groups that stand for the same ones, K flows side by side,
and what it gets goes to its group's replicas over the fast links.

Work is keyed by (epoch of membership, round, fragment). A contribution of weight 0 is left out of the aggregate; nothing
a group did locally depends on the others' answers until a round is applied.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
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
from thinwire.sync.eager import replace_own
from thinwire.sync.exchange import Coder, Outcome, Raw, check, exchange
from thinwire.sync.fragment import Fragment
from thinwire.sync.identity import digest
from thinwire.sync.meeting import Meeting, places_in
from thinwire.sync.outer import mix_into, outer_step
from thinwire.sync.pending import Part, Pending, Round, fill
from thinwire.sync.statement import layout_of, state_of


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
        self.present = set(range(sync.groups))
        """The groups that take part."""
        self.fragments = self._fragments()
        self.schedule: Schedule = sync.schedule(len(self.fragments))
        self._pending: deque[Pending] = deque()
        self.tokens = torch.zeros(len(self.fragments), dtype=torch.float64)
        """Trained on since the last send of each fragment: the weight of its next contribution."""
        self.counted = torch.ones(sync.groups, dtype=torch.float64)
        """Weights, by group, of what an eager update holds in flight when a run is resumed."""
        self._meeting = Meeting(world, self.groups)
        self._same = {"parameters": layout_of(engine), "sync": sync.model_dump_json(), **(same or {})}
        self.compare()
        cliques = self._meeting.cliques(sorted(range_ for fragment in self.fragments for range_ in fragment.ranges))
        self._cliques = [clique for clique, _ in cliques]
        self._places = [[places_in(fragment, ranges) for _, ranges in cliques] for fragment in self.fragments]

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

    def compare(self) -> None:
        """Raises ConfigError, naming a group and what differs, if the groups do not hold the same now.

        Compared are `same`, the outer weights and momentum, what is in flight, and frozen weights; of eager updates, whose
        groups have outer weights of their own, only those they start with. Call it again after loading weights.
        """
        self._meeting.compare({**self._same, **state_of(self.engine, self.fragments, self._pending, self._own_outer)})

    @property
    def _own_outer(self) -> bool:
        """Whether every group has outer weights of its own."""
        return self.sync.own_fresh and self.step > 0

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
            for clique, places in zip(self._cliques, self._places[fragment], strict=True)
        )

    def held_bytes(self) -> int:
        """Bytes of host memory on this rank: outer weights and momentum, and the residual of error feedback."""
        return sum(fragment.held_bytes for fragment in self.fragments)

    # -- the loop's one call -------------------------------------------------------------------------------------------

    def after(self, step: int, *, tokens: float = 1.0) -> list[Round]:
        """Step `step` (counted from 1) is over: send, advance and apply what the schedule says.

        `tokens` is what this group trained on in the step; contributions are weighted with it if the aggregate asks for
        it. Returns the rounds applied. Raises SyncError, on all ranks of the group alike, if this group's outer state is
        not that of the others; they go on without it.
        """
        assert step == self.step + 1, f"step {step} comes after {self.step}: the schedule follows committed steps"
        self.step = step
        self.tokens += tokens
        self._advance(step)
        applied = []
        sent, due = self.schedule.sent_after(step), self.schedule.applied_after(step)
        if sent is not None:
            if self.sync.own_fresh:
                self.drain()
            self._send(sent)
            if self.sync.own_fresh:
                applied.append(self._apply_fresh(sent))
        if due is not None and not self.sync.own_fresh and self._pending and self._pending[0].key == due:
            applied.append(self._apply(self._pending.popleft()))
        elif sent is not None and self.sync.late and not self.sync.own_fresh:
            self._restart(self.fragments[sent.fragment])
        self._fetch_next(step + 1)
        return applied

    def _advance(self, step: int) -> None:
        """Second hops, where the form has them, set out halfway to applying, on all ranks in the same order.

        Backends do not tell reliably whether something has come (gloo's sends and receives are "not completed" until
        waited for), so the time is fixed by the schedule instead.
        """
        for pending in self._pending:
            if pending.hops > 1 and not pending.landed and step >= pending.key.send + (self.schedule.delay + 1) // 2:
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
            key,
            torch.zeros_like(change),
            torch.zeros_like(change),
            epoch=self.epoch,
            groups=len(self.present),
            weight=float(self.tokens[key.fragment]),
            sent_bytes=self.bytes_of(key.fragment),
            hops=1 if swaps(len(self.present), self.sync.codec) else 2,
        )
        for clique, places in zip(self._cliques, self._places[key.fragment], strict=True):
            if not places:
                continue
            part = torch.cat([change[place] for place in places])
            outcome = Outcome(torch.empty_like(part), torch.empty_like(part))
            chain = exchange(
                part,
                outcome,
                weight=pending.weight,
                digest=digest(self._state(key.fragment, places), self.epoch, key.round, key.fragment),
                clique=clique,
                codec=self._codec(key, part.dtype),
                block=self.sync.block,
                how=self.sync.aggregate,
                world=self.world,
                level=self.sync.level,
            )
            pending.parts.append(Part(Flight(chain), outcome, places))
            fill(pending.own, places, outcome.own)
        if fragment.residual is not None:
            fragment.residual.copy_(change.sub_(pending.own))
        self.tokens[key.fragment] = 0.0
        self._pending.append(pending)

    def _state(self, fragment: int, places: list[slice]) -> list[Tensor]:
        """What all groups must hold alike there: outer weights and momentum; of eager updates the last mean change."""
        kept = self.fragments[fragment]
        alike = [pending.change for pending in self._pending] if self.sync.own_fresh else [kept.weights, kept.momentum]
        return [whole[place] for whole in alike for place in places]

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
        """Wait for what has not come; groups found astray are left out from now on. Raises SyncError if this one is."""
        if not pending.landed:
            self._leave_out(pending.land(), pending.key.fragment, f"before round {pending.key.round}")

    def _leave_out(self, found: set[int], fragment: int | None, when: str) -> None:
        """Go on without the groups that any rank of this group `found` astray: every group finds the same ones.

        This group, if it is one of them, gives the others what they still wait for, then stops.
        """
        named = torch.tensor([float(group in found) for group in range(self.sync.groups)])
        all_reduce_small(named, world=self.engine.world, op="max")
        astray = {group for group in self.present if named[group] > 0}
        if not astray:
            return
        if self.group in astray:
            for pending in self._pending:
                pending.land()
            what = "" if fragment is None else f" of fragment {fragment}"
            raise SyncError(
                f"group {self.group}: its outer weights or momentum{what} are not those of the other groups {when}; it "
                f"stops, start it again from a checkpoint"
            )
        self.present -= astray
        self.epoch += 1
        self._cliques = [clique.without(astray) for clique in self._cliques]

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
            pending.epoch,
            key.round,
            key.fragment,
            key.send,
            self.step,
            pending.stall_s,
            pending.sent_bytes,
            pending.groups,
        )

    def _restart(self, fragment: Fragment) -> None:
        """The first round of a late kind: nothing is there to apply, and what was just sent must not be sent again."""
        weights, _ = fragment.take()
        self._write(fragment, weights, self.sync.mix)

    def _apply_fresh(self, key: Exchange) -> Round:
        """Eager updates (arXiv 2502.12996): the last mean change, but this group's own part is its newest."""
        newest, fragment = self._pending[-1], self.fragments[key.fragment]
        last = self._pending.popleft() if len(self._pending) > 1 else None
        fresh, counts = fragment.change(), newest.weight > 0
        if last is None:
            change = fresh.mul_(counts / len(self.present))
            return self._step(newest, change)
        change = torch.empty_like(fresh)
        for places, weights in last.counted:
            own_counts = bool(weights[self.group] > 0)
            others = int((weights > 0).sum()) - own_counts
            for place in places:
                change[place] = replace_own(
                    last.change[place],
                    last.own[place],
                    fresh[place],
                    others=others,
                    own_counts=own_counts,
                    fresh_counts=counts,
                )
        return self._step(last, change)

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
        """At the end of a run: apply what is still in flight now, so that nothing that was sent is lost, and compare.

        Raises SyncError if the outer state that this leaves is not that of the other groups. Eager updates keep what is
        in flight: the next round replaces a part of it.
        """
        applied = []
        while self._pending and not self.sync.own_fresh:
            applied.append(self._apply(self._pending.popleft()))
        self.drain()
        self._check()
        return applied

    def _check(self) -> None:
        """Compare what all groups must hold alike, once more than with every round's messages."""
        flights = []
        for number, clique in enumerate(self._cliques):
            state = [
                part for fragment, places in enumerate(self._places) for part in self._state(fragment, places[number])
            ]
            outcome = Outcome(torch.empty(0), torch.empty(0))
            told = check(digest(state, self.epoch), outcome, clique=clique, world=self.world, level=self.sync.level)
            flights.append((Flight(told), outcome))
        for flight, _ in flights:
            flight.land()
        self._leave_out({group for _, outcome in flights for group in outcome.astray}, None, "after the last round")

    @property
    def pending(self) -> Sequence[Pending]:
        """What was sent and is not applied, oldest first."""
        return tuple(self._pending)

    def start_here(self) -> None:
        """The masters were written from outside before the first step: the outer weights are these. Raises as `compare`."""
        for fragment in self.fragments:
            fragment.weights.copy_(torch.cat([share.master for share in fragment.shares]))
        self.compare()

    def go_on(self, step: int, *, flights: Collection[int]) -> None:
        """Go on after `step`. What was in flight then of the fragments `flights` waits for its values to be read."""
        self.step = step
        self._pending.clear()
        for key in self.schedule.in_flight(step):
            if key.fragment not in flights:
                continue
            fragment = self.fragments[key.fragment]
            like = fragment.shares[0].master.new_zeros(fragment.numel)
            pending = Pending(key, like, like.clone(), epoch=self.epoch, groups=self.sync.groups, landed=True)
            pending.counted.append(([slice(0, fragment.numel)], self.counted))
            self._pending.append(pending)

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
