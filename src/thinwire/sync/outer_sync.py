"""Outer synchronisation: worker groups train on their own and agree on one fragment after the other, behind the steps.

Four separate parts: when (`plan.rounds`, a pure function of the step), how precisely (`comm.codecs`), with whom and
how (`peers`, `exchange`, `rounds_in_flight`), and what is made of it (`outer_step`). Any partition inside the groups: each
rank exchanges the elements it stands for directly with the ranks of the other groups that stand for the same ones, K flows
side by side, and what it gets goes to its group's replicas over the fast links. Groups that a fast level joins may add up
what they send first (`exchange`).

Work is keyed by (epoch of membership, round, fragment). A contribution of weight 0 is left out of the aggregate; nothing
a group did locally depends on the others' answers until a round is applied.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.errors import PlanError, SyncError
from thinwire.plan.rounds import Exchange, Schedule
from thinwire.plan.sync import Sync
from thinwire.sync.fragment import Replica, make_fragments
from thinwire.sync.outer_step import apply_change, fresh_change, restart
from thinwire.sync.peer_groups import PeerGroups, layout_of, state_of
from thinwire.sync.pending import Pending, Round
from thinwire.sync.rounds_in_flight import Links


class OuterSync:
    """Make it after `shard(module, plan, world.inside(level))`; call `after(step)` after each optimizer step.

    `groups` lists the ranks of every group; by default the groups are the members of the world's outermost level. `same`
    says what else must be equal in all groups, by name (plan, tokenizer, corpus). Raises PlanError where `sync` does not
    fit the model or the world, ConfigError if the groups do not start from the same weights and `same`.
    """

    def __init__(
        self,
        engine: Replica,
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
        self.fragments = make_fragments(engine, sync)
        self.schedule: Schedule = sync.schedule(len(self.fragments))
        self._pending: deque[Pending] = deque()
        self.tokens = torch.zeros(len(self.fragments), dtype=torch.float64)
        """Trained on since the last send of each fragment: the weight of its next contribution."""
        self.counted = torch.ones(sync.groups, dtype=torch.float64)
        """Weights, by group, of what an eager update holds in flight when a run is resumed."""
        self._matched = PeerGroups(world, self.groups)
        self._same = {"parameters": layout_of(engine), "sync": sync.model_dump_json(), **(same or {})}
        self.compare()
        self.links = Links(sync, world, self._matched, self.fragments)

    def compare(self) -> None:
        """Raises ConfigError, naming a group and what differs, if the groups do not hold the same now.

        Compared are `same`, the outer weights and momentum, what is in flight, and frozen weights; of eager updates, whose
        groups have outer weights of their own, only those they start with. Call it again after loading weights.
        """
        self._matched.compare({**self._same, **state_of(self.engine, self.fragments, self._pending, self._own_outer)})

    @property
    def _own_outer(self) -> bool:
        """Whether every group has outer weights of its own."""
        return self.sync.own_fresh and self.step > 0

    @property
    def present(self) -> set[int]:
        """The groups that take part."""
        return self.links.groups

    def bytes_of(self, fragment: int) -> int:
        """Bytes that this rank sends to ranks of other groups in one exchange of `fragment`, by the formula."""
        return self.links.bytes_of(fragment)

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
        self.links.keep_pace()
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
            restart(self.engine, self.fragments[sent.fragment], self.sync)
        self._fetch_next(step + 1)
        return applied

    def _advance(self, step: int) -> None:
        """Hops after the first set out at times that the schedule says, on all ranks in the same order.

        Backends do not tell reliably whether something has come (gloo's sends and receives are "not completed" until
        waited for), so that cannot decide.
        """
        for pending in self._pending:
            pending.advance(step)

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
        weight = float(self.tokens[key.fragment])
        pending = self.links.send(key, change, weight=weight, epoch=self.epoch, alike=self._alike)
        if fragment.residual is not None:
            assert pending.own is not None
            fragment.residual.copy_(change.sub_(pending.own))
        self.tokens[key.fragment] = 0.0
        self._pending.append(pending)

    def _alike(self, fragment: int) -> list[Tensor]:
        """What all groups must hold alike of it: outer weights and momentum; of eager updates the last mean change."""
        kept = self.fragments[fragment]
        return [pending.change for pending in self._pending] if self.sync.own_fresh else [kept.weights, kept.momentum]

    # -- applying ------------------------------------------------------------------------------------------------------

    def _land(self, pending: Pending) -> None:
        """Wait for what has not come; groups found diverged are left out from now on. Raises SyncError if this one is."""
        if not pending.landed:
            self._leave_out(pending.land(), pending.key.fragment, f"before round {pending.key.round}")

    def _leave_out(self, found: set[int], fragment: int | None, when: str) -> None:
        """Go on without the groups that any rank of this group `found` diverged: every group finds the same ones.

        This group, if it is one of them, gives the others what they still wait for, then stops.
        """
        named = torch.tensor([float(group in found) for group in range(self.sync.groups)])
        all_reduce_small(named, world=self.engine.world, op="max")
        diverged = {group for group in self.present if named[group] > 0}
        if not diverged:
            return
        if self.group in diverged:
            for pending in self._pending:
                pending.land()
            self.links.settle()
            what = "" if fragment is None else f" of fragment {fragment}"
            raise SyncError(
                f"group {self.group}: its outer weights or momentum{what} are not those of the other groups {when}; it "
                f"stops, start it again from a checkpoint"
            )
        self.epoch += 1
        self.links.drop(diverged)

    def _apply(self, pending: Pending) -> Round:
        """The outer step of a fragment, and the group's own weights mixed with what comes out."""
        self._land(pending)
        return self._step(pending, pending.change)

    def _step(self, pending: Pending, change: Tensor) -> Round:
        key = pending.key
        apply_change(self.engine, self.fragments[key.fragment], change, self.sync)
        return Round(
            pending.epoch,
            key.round,
            key.fragment,
            key.send,
            self.step,
            pending.stall_s + self.links.pace.waited_s(),
            pending.sent_bytes,
            pending.groups,
        )

    def _apply_fresh(self, key: Exchange) -> Round:
        """Apply the last mean change with this group's newest in the place of its own part of it."""
        newest = self._pending[-1]
        last = self._pending.popleft() if len(self._pending) > 1 else None
        fresh, counts = self.fragments[key.fragment].change(), newest.weight > 0
        if last is None:  # nothing of the others yet: they count as unmoved
            return self._step(newest, fresh.mul_(counts / len(self.present)))
        return self._step(last, fresh_change(last, fresh, group=self.group, fresh_counts=counts))

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
        self._leave_out(self.links.check(self.epoch, self._alike), None, "after the last round")
        return applied

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
            own = like.clone() if self.sync.own_fresh else None
            pending = Pending(key, like, own, epoch=self.epoch, groups=self.sync.groups, landed=True)
            pending.counted.append(([slice(0, fragment.numel)], self.counted))
            self._pending.append(pending)

    def drain(self) -> None:
        """Wait for everything in flight without applying it."""
        for pending in self._pending:
            self._land(pending)
        self.links.pace.settle()

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Inside, the model computes with the outer weights, which score better than any group's own (2501.18512).

        Afterwards it holds the bits that it held before, those of weights that had been sent compressed too.
        """
        self.engine.drain()
        kept = [[share.master.clone() for share in fragment.shares] for fragment in self.fragments]
        bring_back = self.engine.as_received()
        self._show([fragment.split(fragment.weights) for fragment in self.fragments])
        try:
            yield
        finally:
            bring_back()
            self._show(kept)

    def _show(self, values: Sequence[Sequence[Tensor]]) -> None:
        for fragment, parts in zip(self.fragments, values, strict=True):
            with self.engine.rewriting(fragment.units, exact=True):
                for share, part in zip(fragment.shares, parts, strict=True):
                    share.master.copy_(part)
        self.engine.drain()
