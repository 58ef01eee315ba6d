"""What autograd saves of gathered weights for backward is where they lie, not the weights: they can be let go of meanwhile.

A weight that a unit's forward uses is saved by autograd as a view of the gathered buffer. Around the forward of a unit that
is gathered anew for backward, saving such a view keeps its place alone, and reading it back gathers the unit if it is not
here. Nothing depends on this but memory: what is saved elsewhere (by checkpointing's own hooks, in a second-order graph)
keeps the buffer that it is a view of.

Which backward is running, and which trained parameters it will give a gradient.

torch's engine numbers the runs of backward, and knows of each node of the graph whether a run will come to it
(`torch.autograd.graph.register_multi_grad_hook` asks it the same). So the end of a unit's gradients is known from the
beginning, also where an expert had no token; a gradient with respect to inputs (a penalty, forces) is told from a backward
that trains; and the backward of a forward that is recomputed is told from the one around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from thinwire.parallel.shard.flat import Flat
from thinwire.parallel.shard.unit import Unit


@dataclass(frozen=True)
class _Lies:
    """A view of a unit's gathered weights."""

    unit: Unit
    flat: Flat
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        whole = self.flat.whole
        assert whole is not None
        if self.dtype.is_complex:
            whole = torch.view_as_complex(whole.view(-1, 2))
        elif self.dtype != whole.dtype:
            whole = whole.view(self.dtype)
        return whole.as_strided(self.size, self.stride, self.offset)


class SavedWeights:
    """`use(unit)` makes a unit's weights be here."""

    def __init__(self, use: Callable[[Unit], None]) -> None:
        self._use = use
        self._holders: dict[int, tuple[Unit, Flat]] = {}
        """By the address of the gathered buffer's storage."""
        self._hooks = (self._save, self._read)

    def enter(self, unit: Unit) -> bool:
        """Begin to save places, if nobody else decides what is saved (checkpointing, offloading); whether it did."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] is not self._hooks[0]:
            return False
        for flat in unit.flats:
            assert flat.whole is not None
            if flat.cut.lp >= 0:
                self._holders[flat.whole.untyped_storage()._cdata] = unit, flat
        torch._C._autograd._push_saved_tensors_default_hooks(*self._hooks)
        return True

    def leave(self, unit: Unit) -> None:
        """End what `enter` began."""
        torch._C._autograd._pop_saved_tensors_default_hooks()
        gone = [address for address, (holder, _) in self._holders.items() if holder is unit]
        for address in gone:
            del self._holders[address]

    def _save(self, tensor: Tensor) -> Any:
        if not torch._C._has_storage(tensor) or tensor.is_conj() or tensor.is_neg():
            return tensor
        found = self._holders.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return _Lies(*found, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _read(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Lies):
            return saved  # type: ignore[no-any-return]
        self._use(saved.unit)
        return saved.read()


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
        self._begins([sum(map(_comes, unit.trained)) if unit in asked else 0 for unit in self._units], nested)

    def _over(self, task: int) -> None:
        if task in self._running:
            self._running.remove(task)


def _comes(parameter: nn.Parameter) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        node = get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # its gradient was asked for itself (autograd.grad): nothing is accumulated
        return False
