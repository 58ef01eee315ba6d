"""torch 2.10 to 2.13 under one name each: GPU images lag behind, and torch renames.

torch 2.13 calls `all_gather_into_tensor` and `reduce_scatter_tensor` by the names below and warns of the old ones; releases
before it have the old ones alone. They are looked up at each call, so that a test can take the new names away.
"""

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

_TORCH: Any = dist  # its stubs know the names of one release


class Waitable(Protocol):
    """What torch.distributed returns for an asynchronous call."""

    def wait(self) -> object: ...


def all_gather_single(out: Tensor, own: Tensor, *, group: dist.ProcessGroup) -> Waitable:
    """(k n,) `out` becomes everybody's (n,) `own` in the order of the ranks, once what comes back has been waited for."""
    call = getattr(_TORCH, "all_gather_single", None) or _TORCH.all_gather_into_tensor
    work: Waitable = call(out, own, group=group, async_op=True)
    return work


def reduce_scatter_single(out: Tensor, full: Tensor, *, group: dist.ProcessGroup) -> Waitable:
    """(n,) `out` becomes the sum of everybody's chunk of (k n,) `full` for this rank, once it has been waited for."""
    call = getattr(_TORCH, "reduce_scatter_single", None) or _TORCH.reduce_scatter_tensor
    work: Waitable = call(out, full, group=group, async_op=True)
    return work
