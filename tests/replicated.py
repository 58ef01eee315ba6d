"""The reference of the engine: every rank holds everything, gradients are summed by one plain all-reduce.

The reference that `engine.Sharded` is tested against, with the same interface. Not for use on thin networks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from thinwire.comm.collectives import all_reduce
from thinwire.comm.world import World
from thinwire.parallel.shard.dtypes import computed_in, master_dtype, norm_of, sum_of_squares
from thinwire.parallel.shard.layout import Piece
from thinwire.parallel.shard.optimizer import Owned
from thinwire.plan.plan import Plan


class Replicated:
    """`replicate(model, plan, world)`: fp32 (or fp64) masters and gradients of every parameter, on every rank."""

    def __init__(self, module: nn.Module, plan: Plan, world: World) -> None:
        self.module, self.plan, self.world = module, plan, world
        self._parameters = dict(module.named_parameters())
        self._masters = {
            name: p.detach().to(master_dtype(p.dtype)).flatten().clone() for name, p in self._parameters.items()
        }
        self._grads = {
            name: torch.zeros_like(m) for name, m in self._masters.items() if self._parameters[name].requires_grad
        }
        self._came = torch.zeros(len(self._grads))
        """Of each parameter, whether backward has given it a gradient in this step."""
        for p in self._parameters.values():
            p.data = p.data.to(computed_in(p.dtype, plan.compute_dtype))
        self.loaded()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward happen inside; the gradient is added to the fp32 sum."""
        yield
        for name, grad in self._grads.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                grad.add_(parameter.grad.flatten())
                parameter.grad = None
                self._came[list(self._grads).index(name)] = 1.0

    def finish_reduce(self) -> None:
        """Sum over all ranks, level by level, inner to outer."""
        for level in range(len(self.world.cluster.levels)):
            for grad in self._grads.values():
                all_reduce(grad, world=self.world, level=level, purpose="G-reduce")
            all_reduce(self._came, world=self.world, level=level, purpose="control")

    def grad_norm(self) -> float:
        """2-norm of the summed gradient."""
        total = sum(sum_of_squares(grad) for grad in self._grads.values())
        return norm_of(total, {grad.dtype for grad in self._grads.values()})

    def owned(self) -> list[Owned]:
        return [
            Owned(
                name,
                tuple(self._parameters[name].shape),
                0,
                self._masters[name],
                partial(self._grad_of, name),
            )
            for name in self._grads
        ]

    def before_step(self) -> None:
        """`finish_reduce` has summed the gradients."""

    def _grad_of(self, name: str) -> Tensor | None:
        return self._grads[name] if self._came[list(self._grads).index(name)] else None

    def updated(self) -> None:
        """The masters changed: bring the model's weights up to date, forget the gradients."""
        self.loaded()
        self.dropped()

    def dropped(self) -> None:
        """Forget the gradients."""
        for state in (*self._grads.values(), self._came):
            state.zero_()

    def at_step(self, step: int) -> None:
        """Nothing here depends on the step."""

    def drain(self) -> None:
        """Nothing is ever in flight."""

    def for_save(self) -> list[Piece]:
        return self.for_load() if self.world.rank == 0 else []

    def for_load(self) -> list[Piece]:
        return [
            Piece(f"params/{name}", tuple(self._parameters[name].shape), 0, master)
            for name, master in self._masters.items()
        ]

    def saves(self, owned: Owned) -> bool:
        """Whether this rank is the one that writes what it owns."""
        return self.world.rank == 0

    def loaded(self) -> None:
        """The masters were written from outside: bring the model's weights up to date."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._masters[name].view_as(parameter))


def replicate(module: nn.Module, plan: Plan, world: World) -> Replicated:
    """Every state on every rank. `module`'s weights must be equal on all ranks already."""
    return Replicated(module, plan, world)
