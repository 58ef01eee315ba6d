"""Memory of tensors, followed operation by operation."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """Follows every storage that an operation touches while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._living: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._living[storage._cdata] = weakref.ref(storage)
        if not func.is_view:  # a view takes no memory
            self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        living = {key: storage for key, ref in self._living.items() if (storage := ref()) is not None}
        self._living = {key: self._living[key] for key in living}
        return sum(storage.nbytes() for storage in living.values())
