"""The partition engine: keeps parameters, gradients and optimizer states each at its level; gathers, reduces, updates.

One story for every setting. Forward and backward of a micro-batch run inside `micro_batch`; before a unit is used its
weights are gathered (the next unit's are already on their way), and as soon as its gradients are complete their
reduction starts behind the rest of backward. `finish_reduce` lands what is still in flight. After the optimizer's step
the new weights set out over the outer levels in forward order, and are awaited by their first use.

All collectives are issued from the thread that runs forward and backward, in an order that is the same on all ranks:
gathers in the order of use, reductions and all-gathers after a step in orders recorded on rank 0 in the first
micro-batch. `timeline` has it, and ranks that gathered in different orders get a sentence
(`thinwire.parallel.shard.order`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.handle import InFlight
from thinwire.comm.world import World
from thinwire.errors import ThinwireError
from thinwire.parallel.shard import carried
from thinwire.parallel.shard.backward import Backwards, running
from thinwire.parallel.shard.deferred import FirstValues, Initial
from thinwire.parallel.shard.find_units import find_units
from thinwire.parallel.shard.guard import (
    check_flat,
    check_parameters,
    refuse_backward,
    refuse_grad,
    refuse_outside,
    refuse_spoilt,
    refuse_transform,
    tensors_in,
)
from thinwire.parallel.shard.hooks import ALIASES, GET_GRAD, Hook, hook_state_dict
from thinwire.parallel.shard.layout import Piece
from thinwire.parallel.shard.order import CallOrder, Tags, check_program
from thinwire.parallel.shard.reductions import Reductions
from thinwire.parallel.shard.saved import SavedWeights
from thinwire.parallel.shard.states import ShardedStates
from thinwire.parallel.shard.unit import Unit, unit_of
from thinwire.parallel.shard.weights import Weights
from thinwire.plan.plan import Plan


class Sharded(ShardedStates):
    """A module whose states are sharded as a plan says. Make it with `shard`."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        world: World,
        units: Sequence[str] | None = None,
        *,
        initial: Initial | None = None,
    ) -> None:
        self.module = module
        self.timeline: list[str] = []
        """What was issued in the latest micro-batch and step, in order."""
        check_parameters(module)
        first = FirstValues(module, initial, world.device)
        super().__init__(
            [unit_of(found, plan, world, first, self._asked) for found in find_units(module, units)], plan, world
        )
        used = sum(flat.layout.used for unit in self.units for flat in unit.flats)
        # Before every step: sums of low rank, which come later, send as many numbers as a rank's rows ask for.
        check_program(self.program(-1).digest, {"units": len(self.units), "numbers in them": used}, world)
        tags = Tags(world, [unit.label for unit in self.units])
        self._weights = Weights(self.units, world, tags, depth=plan.depths[0], note=self._note)
        self._reductions = Reductions(self.units, world, tags, note=self._note, before=self._weights.land_regathers)
        self._calls, self._backwards = CallOrder[Unit](), Backwards(self.units, self._backward_begins)
        self._saved, self._saving = SavedWeights(self._weights.use), list[Unit]()
        self._inside = False
        self._trains = False
        """Whether a backward of this micro-batch has given parameters gradients."""
        self._step, self._count = 0, 0
        """Steps taken, and micro-batches of the next one."""
        self._first, self._finished, self._failed = True, True, False
        """Whether no micro-batch of it has begun; whether its sums are complete, or spoilt."""
        module.register_forward_hook(Hook(lambda module, args, out: self._after_root()))
        for index, unit in enumerate(self.units):
            self._hook(index, unit)
        self._telling: InFlight | None = None
        self._full = False
        """Whether `full_parameters` is entered."""
        hook_state_dict(module, self.full_parameters)
        self.at_step(0)

    # -- making it -----------------------------------------------------------------------------------------------------

    def _hook(self, index: int, unit: Unit) -> None:
        for entry in unit.entries:
            entry.register_forward_pre_hook(Hook(lambda module, args: self._before_forward(unit, module)), prepend=True)
            entry.register_forward_hook(
                Hook(lambda module, args, out: self._after_forward(unit, out)), always_call=True
            )
        for parameter in unit.trained:
            with torch._C.DisableTorchFunctionSubclass():
                parameter.register_post_accumulate_grad_hook(lambda _: self._grad_came(index))  # type: ignore[no-untyped-call]

    # -- a micro-batch -------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch happen inside; `last` is the one before the optimizer's step.

        Marking none as the last, or several, costs time and not exactness. One whose body raises counts for nothing; if
        gradients of it had been summed already, with those of others of its step, the step must be skipped.
        """
        assert not self._inside, "micro-batches do not nest"
        self._begin(last=last)
        try:
            yield
        except ThinwireError:
            raise
        except Exception as error:
            self._give_up()
            refuse_transform(error)
            raise
        finally:
            self._inside = False
        self._end_backward(last=last)

    def _begin(self, *, last: bool) -> None:
        if self._failed:
            refuse_spoilt()
        if self._first:  # what a validation has drawn since the step changes nothing
            self.at_step(self._step)
        self._first = self._finished = False
        self._inside, self._trains, self.timeline = True, False, []
        self._weights.begin(last=last)
        self._reductions.begin(last=last)
        self._calls.begin()
        self._backwards.forget()
        for unit in self.units:
            unit.watch()
            for flat in unit.flats:
                check_flat(flat)
                flat.absorb_edits()

    def _before_forward(self, unit: Unit, entry: nn.Module) -> None:
        if running():  # a recomputed forward: its backward comes next, so the weights stay
            self._backwards.recomputed(unit)
            self._weights.use(unit)
            return
        self._weights.first_use(unit)
        if entry is unit.entries[0]:
            self._weights.prefetch(unit, +1)
        unit.hidden += self._inside and (unit.nests or not torch.is_grad_enabled())
        again = unit.sharded and not (unit.keep or unit.resident)
        if again and self._inside and torch.is_grad_enabled() and self._saved.enter(unit):
            self._saving.append(unit)

    def _after_forward(self, unit: Unit, out: Any) -> None:
        if self._saving and self._saving[-1] is unit and not running():
            self._saved.leave(self._saving.pop())
        if torch.is_grad_enabled():
            self._hook_outputs(unit, out)
        if not (running() or (self._inside and (unit.keep or unit.resident or unit.loose))):
            self._weights.release(unit)

    def _hook_outputs(self, unit: Unit, out: Any) -> None:
        found = [tensor for tensor in tensors_in(out) if tensor.requires_grad and not tensor.is_leaf]
        if found and not self._inside:
            hook: Callable[[Tensor], None] = refuse_backward
        elif found:
            hook = partial(self._back_to, self._calls.called(unit, again=running()))
        for tensor in found:
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _backward_begins(self, counts: list[int], nested: bool) -> None:
        """The first that is heard of a backward, from `Backwards`."""
        if nested:
            self._reductions.expect(counts, nested=True)
            return
        self._calls.again()
        if not any(counts):
            return  # with respect to inputs alone
        if self._trains:
            self._reductions.again()
        self._trains = True
        self._reductions.expect(counts, nested=False)

    def _back_to(self, number: int, _: Tensor) -> None:
        """Backward has come to the outputs of a call."""
        if not self._inside:
            refuse_backward(_)
        self._backwards.heard()
        self._come_through(number)

    def _come_through(self, number: int) -> None:
        for unit in self._calls.back_to(number):
            if self._trains:
                self._reductions.passed(self._calls)
            self._weights.release_over(self._calls)
            self._weights.use(unit)
            self._weights.prefetch(unit, -1)

    def _after_root(self) -> None:
        """A forward without backward (evaluation) leaves nothing gathered and nothing in flight."""
        if not self._inside:
            self._weights.release_all(unless_kept=False)
            self.world.settle()

    def _grad_came(self, index: int) -> None:
        if not self._inside:
            refuse_outside(self.units[index].label)
        self._backwards.heard(self.units[index])
        self._reductions.came(index)

    def _end_backward(self, *, last: bool) -> None:
        """Come through what no gradient has come through here; reduce what has not been. No unit stays gathered."""
        self._come_through(0)
        if not self._reductions.agreed:
            self._weights.agree()
        self._reductions.end()
        self._weights.release_all(unless_kept=True)
        self._count += 1
        if last:
            self._tell_without()

    def _tell_without(self) -> None:
        if self._telling is not None:
            self._telling.finish()
        self._telling = InFlight(self._no_gradients.hops())

    def _give_up(self) -> None:
        """The body of a micro-batch has raised: its gradients are forgotten, and the step if they were in its sums."""
        self._backwards.forget()
        while self._saving:
            self._saved.leave(self._saving.pop())
        self._weights.release_all(unless_kept=True)
        self._failed = self._reductions.begun and self._count > 0
        self._first = self._count == 0
        self._reductions.drop()
        for grads in self._grads:
            grads.forget_grads()
            if self._first:
                grads.dropped()

    # -- parameters that are used elsewhere ----------------------------------------------------------------------------

    def _asked(self, units: Sequence[Unit], what: Callable[..., Any]) -> None:
        """Parameters of these units are used in a function of torch while they are watched."""
        if what == GET_GRAD:
            for unit in units:
                if unit.summed:
                    refuse_grad(unit.label)
            return
        away = [unit for unit in units if not unit.ready]
        if away:
            self._weights.look(units, stays=self._inside or (torch.is_grad_enabled() and what not in ALIASES))

    # -- after a step, and other writes --------------------------------------------------------------------------------

    def before_step(self) -> None:
        """The optimizer is about to read the summed gradients."""
        self.finish_reduce()

    def updated(self) -> None:
        """The masters have changed: send the new weights out, outermost level first, in forward order."""
        for grads in self._grads:
            grads.applied()
        self._weights.regather_all(exact=False)
        self.at_step(self._step + 1)
        self._begin_step()

    def _begin_step(self) -> None:
        self._first, self._failed, self._count = True, False, 0
        for unit in self.units:
            unit.summed = False
            unit.watch()

    def at_step(self, step: int) -> None:
        """Steps taken so far: what stochastic rounding draws its numbers from, besides rank and position."""
        self._step = step
        flats = (flat for unit in self.units for flat in unit.flats)
        for number, flat in enumerate(flats):
            flat.spec.at_step(step, number)

    def loaded(self) -> None:
        """The masters were written from outside: everything derived from them is stale, and is made anew.

        Exactly, or, where `carried_for_load` found how compressed weights had been sent, with the bits they had.
        """
        for unit in self.units:
            carried.arrived(unit)
        self._weights.regather_all(exact=True)
        self.drain()

    @contextmanager
    def rewriting(self, units: Sequence[int], *, exact: bool = False) -> Iterator[None]:
        """Inside, this rank's `shares` of these units may be written; all ranks of the group do so together.

        Afterwards the shares are on their way to every copy, coded as after a step, or (`exact`) as they are.
        """
        chosen = [self.units[index] for index in units]
        for unit in chosen:
            self._weights.land_regather(unit)
        yield
        for unit in chosen:
            InFlight(*(flat.broadcast_hops() for flat in unit.flats if flat.trained)).finish()
            self._weights.regather(unit, exact=exact)

    def drain(self) -> None:
        """Land everything in flight; call it before reading state or evaluating."""
        self._reductions.land()
        self._weights.land_regathers()
        self.world.settle()
        for unit in self.units:
            for flat in unit.flats:
                flat.absorb_edits()

    # -- gradients -----------------------------------------------------------------------------------------------------

    def finish_reduce(self) -> None:
        """Wait for the reductions in flight: the owned gradients are the sums over all ranks and micro-batches.

        Raises UseError if ranks that share weights have not gathered the same units in the same order.
        """
        if self._failed:
            refuse_spoilt()
        if self._finished:
            return
        self._reductions.finish()
        if self._telling is None:
            self._tell_without()
        assert self._telling is not None
        self._telling.finish()
        self._telling = None
        self._weights.check()
        self._weights.release_all(unless_kept=False)
        self.world.settle()
        for unit in self.units:
            for flat in unit.flats:
                flat.absorb_edits()
        self._finished = True

    def dropped(self) -> None:
        """Forget the gradients of a step that is not taken, those still on their way too."""
        if not self._failed:
            self.finish_reduce()
        for grads in self._grads:
            grads.dropped()
        self._finished = True
        self._begin_step()

    def carried_for_save(self) -> list[Piece]:
        """What this rank is to write of what else a step takes over from the one before. Lands what is in flight."""
        self.drain()
        return [piece for unit in self.units for piece in carried.to_save(unit)]

    def carried_for_load(self, saved: Collection[str]) -> list[Piece]:
        """What this rank takes over of it from the tensors named in `saved`; fill them, then call `loaded`."""
        return [piece for unit in self.units for piece in carried.to_load(unit, saved)]

    def starts_afresh(self, saved: Collection[str]) -> bool:
        """Whether the tensors named in `saved` do not give compressed weights the bits that they had."""
        return carried.starts_afresh((flat for unit in self.units for flat in unit.flats), saved)

    # -- full parameters --------------------------------------------------------------------------------------------------

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Inside, every parameter of the module is full, to be read, or written alike on all ranks.

        All ranks enter together. Inside another one it does nothing.
        """
        outermost, self._full = not self._full, True
        if outermost:
            self.drain()
            for unit in self.units:
                self._weights.use(unit)
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
            self._weights.release(unit)
        self.world.settle()

    # -- small things --------------------------------------------------------------------------------------------------

    def _note(self, what: str, unit: Unit) -> None:
        self.timeline.append(f"{what} {unit.label}")


def shard(
    module: nn.Module,
    plan: Plan,
    world: World,
    units: Sequence[str] | None = None,
    *,
    initial: Initial | None = None,
) -> Sharded:
    """Shard the states of `module` as `plan` says. Its weights must be equal on all ranks; it is changed in place.

    `units` names submodules whose states move together; the default is every ModuleList entry, and each other child.
    Parameters on the meta device get the values that `initial(name)` makes, on any device, the same on all ranks: asked
    for one by one, so that no rank holds more at a time than its own states and one unit. A tied one is asked for once.
    Raises PlanError if the plan's levels are not the world's, or a unit's name is wrong; UseError if values are missing.
    """
    plan.check_levels(world.cluster)
    return Sharded(module, plan, world, units, initial=initial)
