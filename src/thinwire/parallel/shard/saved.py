"""What autograd saves of gathered weights for backward is where they lie, not the weights: they can be let go of meanwhile.

A weight that a unit's forward uses is saved by autograd as a view of the gathered buffer. Around the forward of a unit that
is gathered anew for backward, saving such a view keeps its place alone, and reading it back gathers the unit if it is not
here. Nothing depends on this but memory: what is saved elsewhere (by checkpointing's own hooks, in a second-order graph)
keeps the buffer that it is a view of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        unsharded = self.flat.unsharded
        assert unsharded is not None
        if self.dtype.is_complex:
            unsharded = torch.view_as_complex(unsharded.view(-1, 2))
        elif self.dtype != unsharded.dtype:
            unsharded = unsharded.view(self.dtype)
        return unsharded.as_strided(self.size, self.stride, self.offset)


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
            assert flat.unsharded is not None
            if flat.sharded:
                self._holders[flat.unsharded.untyped_storage()._cdata] = unit, flat
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
