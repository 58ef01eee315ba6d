"""An elementwise torch optimizer over the master shards that a rank owns.

The engine hands out `Owned` parts: flat views of its fp32 masters and of their summed gradients, one per parameter that
the rank's interval meets. Any optimizer whose update of an element depends on that element alone (AdamW, SGD, Lion, ...)
then computes what it would on whole tensors, with its own fused or foreach kernels.

Saved of its state, parameter by parameter: what has a number for each element, and what is a single number (NAdam's
product of momenta); the count of steps only where it is not `updates`.

Whether an optimizer's update of an element depends on that element alone: found by trying it.

A rank owns flat intervals of parameters. AdamW, SGD or Lion compute on them what they would on whole tensors; Adafactor,
LAMB or Muon, which look at rows, columns or norms, would compute something else without a word.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.errors import PlanError
from thinwire.parallel.shard.layout import Piece

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
_TRIAL_STEPS = 3


def check_elementwise(build: Build, options: dict[str, Any], like: Tensor) -> None:
    """Raises PlanError unless `build` makes an optimizer that treats a matrix as it does two flat parts of it.

    `options` are those of the parameter groups; `like` is a tensor of the precision and device of the masters.
    """
    make: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        start, *grads = (torch.randn(4, 4, generator=generator).to(**make) for _ in range(1 + _TRIAL_STEPS))
        full = _trained(build, options, [start], [[grad] for grad in grads])
        parts = _trained(build, options, _parts(start), [_parts(grad) for grad in grads])
    if full is None or parts is None or not torch.allclose(full, parts, rtol=1e-5, atol=1e-7):
        raise PlanError(
            "this optimizer's update of an element depends on others (its row, its column, a norm), and every rank owns "
            "flat parts of parameters; take one that is elementwise, such as AdamW, SGD or Lion"
        )


def _parts(matrix: Tensor) -> list[Tensor]:
    return list(torch.split(matrix.flatten(), [5, 11]))


def _trained(
    build: Build, options: dict[str, Any], start: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> Tensor | None:
    """What steps make of `start`, flat; None if the optimizer does not take such tensors."""
    params = [part.clone() for part in start]
    try:
        optimizer = build([{"params": params, **options}])
    except ValueError:
        return None
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return torch.cat([param.flatten() for param in params])


@dataclass(frozen=True)
class Owned:
    """Elements offset .. offset + len(master) of parameter `name` of shape `shape`: master weights and their gradient."""

    name: str
    shape: tuple[int, ...]
    offset: int
    master: Tensor
    grad: Callable[[], Tensor | None]
    """The summed gradient of these elements, once it is complete; None if no rank has one for the parameter."""


_STEPS = "optimizer.step/"


class Engine(Protocol):
    """What the optimizer needs of an engine."""

    def owned(self) -> list[Owned]: ...

    def before_step(self) -> None: ...

    def updated(self) -> None: ...

    def dropped(self) -> None: ...

    def saves(self, owned: Owned) -> bool: ...

    def at_step(self, step: int) -> None: ...


class ShardedOptimizer:
    """Builds `build([{"params": [...], **group_of(name, shape)}, ...])` over the owned parts and steps it.

    `updates` counts the steps applied; a skipped step leaves every state as it was. `build` is called for a few small
    tensors first, to see that its updates are elementwise; PlanError is raised, on all ranks, if they are not.
    """

    def __init__(
        self, engine: Engine, build: Build, *, group_of: Callable[[str, tuple[int, ...]], dict[str, Any]] | None = None
    ) -> None:
        self._engine = engine
        self._owned = engine.owned()
        self.updates = 0
        self._steps: dict[str, Tensor] = {}
        """Of a checkpoint that is being loaded: parameters' own counts of steps."""
        groups: dict[tuple[tuple[str, Any], ...], list[Tensor]] = {}
        for part in self._owned:
            options = {} if group_of is None else group_of(part.name, part.shape)
            groups.setdefault(tuple(sorted(options.items())), []).append(part.master)
        made = [{"params": tensors, **dict(options)} for options, tensors in groups.items()]
        for chosen in groups:
            check_elementwise(build, dict(chosen), self._owned[0].master)
        self._optimizer = build(made) if made else None

    def set_lr(self, lr: float) -> None:
        """Use `lr` for all groups from the next step on."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr

    def step(self, *, grad_scale: float = 1.0) -> None:
        """Multiply the gradients by `grad_scale`, update the masters, and start bringing the weights up to date."""
        self._engine.before_step()
        for part in self._owned:
            grad = part.grad()
            part.master.grad = grad if grad is None or grad_scale == 1 else grad.mul_(grad_scale)
        if self._optimizer is not None:
            self._optimizer.step()
            self._forget_grads()
        self.updates += 1
        self._engine.updated()

    def skip(self) -> None:
        """Drop the gradients; nothing else changes."""
        self._engine.dropped()

    def for_save(self) -> list[Piece]:
        """The states that this rank is to write: `optimizer.KEY/PARAMETER`. A single number is written by one rank.

        Raises PlanError, on every rank that owns anything, for a state that can be neither sharded nor saved.
        """
        pieces = [(part, piece) for part in self._owned for piece in [*self._pieces(part), *self._fewer_steps(part)]]
        return [piece for part, piece in pieces if self._engine.saves(part) and (piece.shape or part.offset == 0)]

    def for_load(self, saved: Collection[str] | None = None) -> list[Piece]:
        """Every state of this rank, made if the first step is yet to come; of those named in `saved`, if that is given.

        A parameter of which nothing is in `saved` has never had a gradient: its states are made at its first. Raises
        PlanError as `for_save` does.
        """
        self._materialise()
        pieces = [(part, self._pieces(part)) for part in self._owned]
        if saved is None:
            return [piece for _, found in pieces for piece in found]
        wanted: list[Piece] = []
        for part, found in pieces:
            there = [piece for piece in found if piece.name in saved]
            if found and not there and self._optimizer is not None:
                del self._optimizer.state[part.master]
            wanted += there
            own = Piece(_STEPS + part.name, (), 0, torch.zeros(1))
            if own.name in saved:
                self._steps[part.name] = own.tensor
                wanted.append(own)
        return wanted

    def loaded(self, updates: int) -> None:
        """The states were filled from a checkpoint taken after `updates` steps."""
        self.updates = updates
        self._engine.at_step(updates)
        for part, state in zip(self._owned, self._states(), strict=True):
            steps = float(self._steps[part.name]) if part.name in self._steps else float(updates)
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(steps)
            elif "step" in state:
                state["step"] = type(state["step"])(steps)
        self._steps = {}

    def _fewer_steps(self, part: Owned) -> Iterator[Piece]:
        """A parameter's own count of steps, where it had no gradient in some."""
        assert self._optimizer is not None
        count = self._optimizer.state[part.master].get("step")
        if count is not None and float(count) != self.updates:
            yield Piece(_STEPS + part.name, (), 0, torch.tensor([float(count)]))

    def _states(self) -> list[dict[str, Any]]:
        if self._optimizer is None:
            return []
        return [self._optimizer.state[part.master] for part in self._owned]

    def _pieces(self, part: Owned) -> list[Piece]:
        assert self._optimizer is not None
        state = self._optimizer.state[part.master]
        return [self._piece(part, key, value) for key, value in state.items() if key != "step" and value is not None]

    def _piece(self, part: Owned, key: str, value: object) -> Piece:
        name = f"optimizer.{key}/{part.name}"
        if isinstance(value, Tensor) and value.shape == part.master.shape:
            return Piece(name, part.shape, part.offset, value)
        if isinstance(value, Tensor) and value.dim() == 0:
            return Piece(name, (), 0, value.view(1))
        kind = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise PlanError(
            f"{type(self._optimizer).__name__}'s state {key!r} of {part.name} {kind}: neither a number for each of its "
            f"{part.master.numel()} elements here nor a single tensor of one, so it cannot be saved or loaded under another "
            "partition; take an optimizer whose update of an element depends on that element alone, such as AdamW"
        )

    def _materialise(self) -> None:
        """Make the optimizer create its states: a step with zero gradients and zero learning rate, then undone."""
        if self._optimizer is None or all(self._states()):
            return
        kept = [part.master.clone() for part in self._owned]
        rates = [(group["lr"], group.get("weight_decay")) for group in self._optimizer.param_groups]
        for part in self._owned:
            part.master.grad = torch.zeros_like(part.master)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._optimizer.step()
        for group, (lr, _) in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        for part, before in zip(self._owned, kept, strict=True):
            part.master.copy_(before)
        for state in self._states():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        self._forget_grads()

    def _forget_grads(self) -> None:
        for part in self._owned:
            part.master.grad = None
