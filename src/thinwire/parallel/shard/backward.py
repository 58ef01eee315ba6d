"""Which backward is running, and which trained parameters it will give a gradient.

torch's engine numbers the runs of backward, and knows of each node of the graph whether a run will come to it
(`torch.autograd.graph.register_multi_grad_hook` asks it the same). So the end of a unit's gradients is known from the
beginning, also where an expert had no token; a gradient with respect to inputs (a penalty, forces) is distinguished
from a backward that trains; and the backward of a forward that is recomputed is distinguished from the one around it.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from thinwire.parallel.shard.unit import Unit

_engine: Any = torch.autograd.Variable._execution_engine


def running() -> bool:
    """Whether this thread is in a backward."""
    return torch._C._current_graph_task_id() >= 0


class Backwards:
    """`begins(counts, nested)` is called when a backward is first heard of: gradients to come, by unit."""

    def __init__(self, units: Sequence[Unit], begins: Callable[[list[int], bool], None]) -> None:
        self._units, self._begins = units, begins
        self._running: list[int] = []
        self._again: set[Unit] = set()

    def recomputed(self, unit: Unit) -> None:
        """A forward of the unit was run again: a nested backward may follow."""
        self._again.add(unit)

    def forget(self) -> None:
        """Nothing is running: one that failed does not end."""
        self._running, self._again = [], set()

    def heard(self, unit: Unit | None = None) -> None:
        """Something (a gradient of `unit`) comes in a backward: call it first in every hook."""
        task = torch._C._current_graph_task_id()
        if task in self._running:
            return
        nested = bool(self._running)
        self._running.append(task)
        _engine.queue_callback(lambda: self._over(task))
        asked = self._again | {unit} if nested else set(self._units)
        self._again = set()
        self._begins(_to_come([unit.trained if unit in asked else () for unit in self._units]), nested)

    def _over(self, task: int) -> None:
        if task in self._running:
            self._running.remove(task)


class _Ends(torch.autograd.Function):
    """A node whose inputs are the ends of the graph at which parameters get their gradients; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        return torch.empty(0)


_apply: Any = super(torch.autograd.Function, _Ends).apply
"""Not `Function.apply`, which refuses inside torch.func's transforms, where a unit's forward may be."""


def _to_come(parameters: Sequence[Sequence[Tensor]]) -> list[int]:
    """How many of each of these parameters the running backward will give a gradient.

    All nodes are found at once: `get_gradient_edge` runs an operation for every parameter.
    """
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        made = _apply(*(each for some in parameters for each in some))
    nodes = iter([] if made.grad_fn is None else [node for node, _ in made.grad_fn.next_functions])
    return [sum(map(_comes, islice(nodes, len(some)))) for some in parameters]


def _comes(node: Any) -> bool:
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # its gradient was asked for itself (autograd.grad): nothing is accumulated
        return False
