"""The partition engine: keeps parameters, gradients and optimizer states each at its level; gathers, reduces, updates.

One story for every setting. Forward and backward of a micro-batch run inside `micro_batch`; before a unit is used its
weights are gathered (the next unit's are already on their way), and as soon as its gradients are complete their
reduction starts behind the rest of backward. `finish_reduce` lands what is still in flight. After the optimizer's step
the new weights set out over the outer levels in forward order, and are awaited by their first use.

All collectives are issued from the thread that runs forward and backward, in an order that is the same on all ranks:
gathers in the order of use, reductions and refreshes in orders recorded on rank 0 in the first micro-batch. `timeline`
has it, and ranks that gathered in different orders are told so (`thinwire.partition.order`).
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.flight import Flight
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.partition import carried
from thinwire.partition.deferred import FirstValues, Initial
from thinwire.partition.dtypes import norm_of, sum_of_squares
from thinwire.partition.guard import check_whole, refuse_backward, refuse_gradient, tensors_in
from thinwire.partition.optimizer import Owned
from thinwire.partition.order import GatherOrder, of_rank_0
from thinwire.partition.pieces import Piece, Share
from thinwire.partition.state_dict import hook_state_dict
from thinwire.partition.unit import Unit, unit_of
from thinwire.partition.units import find_units
from thinwire.plan import Plan


class Sharded:
    """A module whose states are cut as a plan says. Make it with `shard`."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        world: World,
        units: Sequence[str] | None = None,
        *,
        initial: Initial | None = None,
    ) -> None:
        self.module, self.plan, self.world = module, plan, world
        self.timeline: list[str] = []
        """What was issued in the latest micro-batch and step, in order."""
        self._slowest = next((level.name for level in reversed(world.cluster.levels) if level.fanout > 1), None)
        first = FirstValues(module, initial, world.device)
        self.units = [unit_of(found, plan, world, first) for found in find_units(module, units)]
        self._order: list[Unit] = []
        """Units in order of first use in forward."""
        self._reductions: list[int] | None = None
        self._refreshes = list(range(len(self.units)))
        """Units in rank 0's order of first use, as the first micro-batch found it."""
        self._gathers = GatherOrder(world, plan.depths[0])
        self._complete: list[int] = []
        self._issued = 0
        self._flights: deque[Flight] = deque()
        """Reductions in flight, oldest first."""
        self._refreshing: deque[Unit] = deque()
        """Units whose new weights are on their way, oldest first."""
        self._inside, self._last, self._backward = False, False, False
        self._step, self._first = 0, True
        """Steps taken, and whether no micro-batch of the next one has begun."""
        module.register_forward_pre_hook(lambda module, args: self._before_root())
        module.register_forward_hook(lambda module, args, out: self._after_root())
        for index, unit in enumerate(self.units):
            self._hook(index, unit)
        self._full = False
        """Whether `full_parameters` is entered."""
        hook_state_dict(module, self.full_parameters, copies=plan.depths[0] >= 0)
        self.at_step(0)

    # -- making it -----------------------------------------------------------------------------------------------------

    def _hook(self, index: int, unit: Unit) -> None:
        for entry in unit.entries:
            entry.register_forward_pre_hook(lambda module, args: self._before_forward(unit, module), prepend=True)
            entry.register_forward_hook(lambda module, args, out: self._after_forward(unit, out))
        for parameter in unit.trained:
            parameter.register_post_accumulate_grad_hook(lambda _: self._grad_came(index))  # type: ignore[no-untyped-call]

    # -- a micro-batch -------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch happen inside; `last` is the one before the optimizer's step."""
        assert not self._inside, "micro-batches do not nest"
        if self._first:  # what a validation has drawn since the step changes nothing
            self.at_step(self._step)
        self._first = False
        self._inside, self._last, self._issued, self._complete = True, last, 0, []
        self.timeline = []
        for unit in self.units:
            unit.waiting = len(unit.trained)
            for flat in unit.flats:
                check_whole(flat, refreshing=unit.refreshing is not None)
                flat.absorb_edits()
        try:
            yield
        finally:
            self._inside = False
        self._end_backward()

    def _before_forward(self, unit: Unit, entry: nn.Module) -> None:
        if self._backward:  # a recomputed forward: its backward comes next, so the weights stay
            self._release_after(unit)
            self._use(unit)
            return
        self._use(unit)
        if unit not in self._order:
            self._order.append(unit)
        if entry is unit.entries[0]:
            self._prefetch(unit, +1)

    def _after_forward(self, unit: Unit, out: Any) -> None:
        if self._backward:
            return
        if torch.is_grad_enabled():
            hook = (lambda _: self._before_backward(unit)) if self._inside else refuse_backward
            for tensor in tensors_in(out):
                if tensor.requires_grad:
                    tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        if not (self._inside and (unit.keep or unit.resident)):
            self._release(unit)

    def _before_backward(self, unit: Unit) -> None:
        """The unit's backward begins, so those of all units after it are over, unless its uses are in several places."""
        self._backward = True
        self._release_after(unit)
        self._use(unit)
        self._prefetch(unit, -1)

    def _release_after(self, unit: Unit) -> None:
        if not unit.resident and unit in self._order:
            for done in self._order[self._order.index(unit) + 1 :]:
                if not (done.resident or self._kept(done)):
                    self._release(done)

    def _before_root(self) -> None:
        """Units that no forward has been seen to use may be used in other ways: their weights are brought up to date."""
        for unit in self.units:
            if unit not in self._order:
                self._land_refresh(unit)

    def _after_root(self) -> None:
        """A forward without backward (evaluation) leaves nothing gathered and nothing in flight."""
        if not self._inside:
            for unit in self.units:
                self._land_gather(unit)
                self._release(unit)

    def _grad_came(self, index: int) -> None:
        unit = self.units[index]
        unit.waiting -= 1
        if not self._inside or unit.waiting < 0:
            refuse_gradient(f"unit {unit.name or 'root'}", inside=self._inside)
        if unit.waiting == 0:
            self._complete.append(index)
            self._reduce_ready()

    def _end_backward(self) -> None:
        """Reduce what has not been, in order, and record that order the first time. No unit stays gathered."""
        if self._reductions is None:
            self._agree_on_orders()
            assert self._reductions is not None
        rest = [index for index in self._reductions if index not in self._complete]
        self._complete += rest
        self._reduce_ready()
        for unit in self.units:
            self._land_gather(unit)
            if not self._kept(unit):
                self._release(unit)
        self._backward = False

    def _kept(self, unit: Unit) -> bool:
        """Whether the unit's weights stay whole for the next micro-batch: they do not change before the step."""
        return unit.keep and not self._last

    # -- weights -------------------------------------------------------------------------------------------------------

    def _use(self, unit: Unit) -> None:
        """The unit's weights are whole when this returns."""
        if not unit.gathered and unit.gathering is None:
            self._start_gather(unit)
        self._land_refresh(unit)
        self._land_gather(unit)

    def _prefetch(self, unit: Unit, direction: int) -> None:
        """Start gathering the unit that comes next in this direction."""
        position = self._order.index(unit) + direction
        if not 0 <= position < len(self._order):
            return
        following = self._order[position]
        if not following.gathered and following.gathering is None:
            self._start_gather(following)

    def _start_gather(self, unit: Unit) -> None:
        self._land_refresh(unit)
        self._note("gather", unit)
        self._gathers.note(unit.name or "root")
        unit.gathering = Flight(*(flat.gather_chain() for flat in unit.flats))

    def _land_gather(self, unit: Unit) -> None:
        if unit.gathering is not None:
            unit.gathering.land()
            unit.gathering = None

    def _land_refresh(self, unit: Unit) -> None:
        """Older ones first: inner hops are issued as they land, and ranks may use units in different orders."""
        while unit.refreshing is not None:
            older = self._refreshing.popleft()
            assert older.refreshing is not None
            older.refreshing.land()
            older.refreshing = None

    def _land_refreshes(self) -> None:
        while self._refreshing:
            self._land_refresh(self._refreshing[-1])

    def _release(self, unit: Unit) -> None:
        if unit.gathering is None:
            for flat in unit.flats:
                if flat.gathered:
                    flat.release()

    def updated(self) -> None:
        """The masters have changed: send the new weights out, outermost level first, in forward order."""
        for unit in (self.units[index] for index in self._refreshes):
            for flat in unit.flats:
                flat.applied()
            self._refresh(unit, exact=False)
        self.at_step(self._step + 1)
        self._first = True

    def at_step(self, step: int) -> None:
        """Steps taken so far: what stochastic rounding draws its numbers from, besides rank and position."""
        self._step = step
        flats = (flat for unit in self.units for flat in unit.flats)
        for number, flat in enumerate(flats):
            flat.salt(step, number)

    def loaded(self) -> None:
        """The masters were written from outside: everything derived from them is stale, and is made anew exactly."""
        for unit in self.units:
            for flat in unit.flats:
                flat.residual.arrived()
            self._refresh(unit, exact=True)
        self.drain()

    @contextmanager
    def rewriting(self, units: Sequence[int], *, exact: bool = False) -> Iterator[None]:
        """Inside, this rank's `shares` of these units may be written; all ranks of the group do so together.

        Afterwards the shares are on their way to every copy, coded as after a step, or (`exact`) as they are.
        """
        chosen = [self.units[index] for index in units]
        for unit in chosen:
            self._land_refresh(unit)
        yield
        for unit in chosen:
            Flight(*(flat.spread_chain() for flat in unit.flats if flat.trained)).land()
            self._refresh(unit, exact=exact)

    def _refresh(self, unit: Unit, *, exact: bool) -> None:
        self._land_refresh(unit)
        self._land_gather(unit)
        self._release(unit)
        self._note("refresh", unit)
        unit.refreshing = Flight(*(flat.refresh_chain(exact=exact) for flat in unit.flats if exact or flat.trained))
        self._refreshing.append(unit)

    def drain(self) -> None:
        """Land everything in flight; call it before reading state or evaluating."""
        self._land_all()
        self._land_refreshes()
        for unit in self.units:
            for flat in unit.flats:
                flat.absorb_edits()

    # -- gradients -----------------------------------------------------------------------------------------------------

    def _reduce_ready(self) -> None:
        """Start the reductions whose turn it is: in the recorded order, as far as the units are complete.

        What this forward has not used of the new weights is awaited first, so that no rank's reduction overtakes it.
        """
        if self._reductions is None:
            return
        self._land_refreshes()
        while self._issued < len(self._reductions) and self._reductions[self._issued] in self._complete:
            unit = self.units[self._reductions[self._issued]]
            self._issued += 1
            self._advance_older()
            self._note("reduce", unit)
            flight = Flight(*(flat.reduce_chain(last=self._last) for flat in unit.flats if flat.trained))
            self._flights.append(flight)
            while self._flights and self._flights[0].landed:
                self._flights.popleft()

    def _advance_older(self) -> None:
        """Earlier reductions go on by a hop; the latest is let be on the slowest links, which shall never run dry."""
        for flight in self._flights:
            if flight is not self._flights[-1] or self._slowest not in flight.levels:
                flight.advance()

    def _agree_on_orders(self) -> None:
        """As gradients came on rank 0, then the units that got none; as rank 0's forward used units, then the others."""
        trained = [index for index, unit in enumerate(self.units) if unit.trained]
        seen = self._complete + [index for index in reversed(trained) if index not in self._complete]
        used = [self.units.index(unit) for unit in self._order]
        orders = of_rank_0([*seen, *used, *(index for index in self._refreshes if index not in used)], self.world)
        self._reductions, self._refreshes = orders[: len(seen)], orders[len(seen) :]

    def _land_all(self) -> None:
        """Hop by hop over all reductions in flight, so that they go on overlapping each other."""
        while self._flights:
            for flight in self._flights:
                flight.advance()
            while self._flights and self._flights[0].landed:
                self._flights.popleft()

    def finish_reduce(self) -> None:
        """Wait for the reductions in flight: the owned gradients are the sums over all ranks and micro-batches.

        Raises UseError if ranks that share weights have not gathered the same units in the same order.
        """
        self._land_all()
        self._gathers.check()

    def grad_norm(self) -> float:
        """Global 2-norm of the summed gradient, every logical element counted once; the same on all ranks.

        Rounded to the gradients' precision, so that it does not depend on how the sum was cut.
        """
        own = sum(sum_of_squares(flat.reduced_used) for unit in self.units for flat in unit.flats if flat.trained)
        total = torch.tensor([own], dtype=torch.float64)
        all_reduce_small(total, world=self.world, op="sum", levels=range(self.plan.depths[2] + 1))
        return norm_of(total.item(), {flat.grads.dtype for unit in self.units for flat in unit.flats if flat.trained})

    def dropped(self) -> None:
        """Forget the gradients of a step that is not taken, those still on their way too."""
        self._land_all()
        self._first = True
        for unit in self.units:
            for flat in unit.flats:
                flat.dropped()

    # -- state ---------------------------------------------------------------------------------------------------------

    def owned(self) -> list[Owned]:
        """This rank's trained masters, for the optimizer."""
        return [part for unit in self.units for flat in unit.flats for part in flat.owned()]

    def shares(self, *, trained: bool = True) -> list[Share]:
        """What this rank alone stands for of every trained (or every frozen) flat buffer, in the model's canonical order."""
        found, base = [], 0
        for index, unit in enumerate(self.units):
            for flat in (flat for flat in unit.flats if flat.trained == trained):
                first, view = flat.share()
                named: list[tuple[str, tuple[int, ...], int, slice]] = []
                flat.parts(lambda *part: named.append(part), depth=len(self.world.cluster.levels) - 1)  # noqa: B023
                found.append(Share(index, unit.name or "root", base + first, view, tuple(named)))
                base += flat.layout.used
        return found

    def saves(self, owned: Owned) -> bool:
        """Whether this rank writes what it owns: of equal replicas only the first does."""
        return self._first_replica()

    def for_save(self, *, trained_only: bool = False) -> list[Piece]:
        """The pieces of the model's (or only its trained) parameters that this rank is to write. Lands what is in flight."""
        self.drain()
        return self.for_load(trained_only=trained_only) if self._first_replica() else []

    def for_load(self, *, trained_only: bool = False) -> list[Piece]:
        """Every piece that this rank holds; fill them, then call `loaded`."""
        flats = [flat for unit in self.units for flat in unit.flats]
        return [piece for flat in flats if flat.trained or not trained_only for piece in flat.pieces()]

    def carried_for_save(self) -> list[Piece]:
        """What this rank is to write of what error feedback and low-rank sums carry from step to step."""
        return [piece for unit in self.units for flat in unit.flats for piece in carried.to_save(flat)]

    def carried_for_load(self, saved: Collection[str]) -> list[Piece]:
        """What this rank takes over of it from the tensors named in `saved`; fill them, then call `loaded`."""
        return [piece for unit in self.units for flat in unit.flats for piece in carried.to_load(flat, saved)]

    def _first_replica(self) -> bool:
        outer = self.world.cluster.coordinates(self.world.rank)[self.plan.depths[2] + 1 :]
        return not any(outer)

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Inside, every parameter of the module is whole, to be read, or written alike on all ranks.

        All ranks enter together. Inside another one it does nothing.
        """
        outermost, self._full = not self._full, True
        if outermost:
            self.drain()
            for unit in self.units:
                self._use(unit)
        try:
            yield
        finally:
            self._full = not outermost
            if outermost:
                self._close_full()

    def _close_full(self) -> None:
        for unit in self.units:
            for flat in unit.flats:
                flat.absorb_edits()
            self._release(unit)

    # -- small things --------------------------------------------------------------------------------------------------

    def _note(self, what: str, unit: Unit) -> None:
        self.timeline.append(f"{what} {unit.name or 'root'}")


def shard(
    module: nn.Module,
    plan: Plan,
    world: World,
    units: Sequence[str] | None = None,
    *,
    initial: Initial | None = None,
) -> Sharded:
    """Cut the states of `module` as `plan` says. Its weights must be equal on all ranks; it is changed in place.

    `units` names submodules whose states move together; the default is every ModuleList entry, and each other child.
    Parameters on the meta device get the values that `initial(name)` makes, on any device, the same on all ranks: asked
    for one by one, so that no rank holds more at a time than its own states and one unit. A tied one is asked for once.
    Raises PlanError if the plan's levels are not the world's, or a unit's name is wrong; UseError if values are missing.
    """
    levels = tuple((level.name, level.fanout) for level in world.cluster.levels)
    if plan.levels != levels:
        raise PlanError(f"the plan is for levels {plan.levels}, this world has {levels}; make the plan anew")
    return Sharded(module, plan, world, units, initial=initial)
