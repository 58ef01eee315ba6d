"""The Walsh-Hadamard rotation of blocks, by butterflies in a fixed order, so that its bits are the same everywhere.

Blocks are turned on their side first: each of the log2(k) steps then adds and subtracts long rows.

Shapes: b blocks, k numbers of a block (a power of two)
"""

import math

import torch
from torch import Tensor


class Rotation:
    """Rotates (b, k) tensors, in memory that is used again for each."""

    def __init__(self, b: int, k: int, device: torch.device) -> None:
        self.blocks = b
        here, there = (torch.empty(k, b, device=device) for _ in range(2))
        self._first = here
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        half = 1
        while half < k:
            source, target = (x.view(k // (2 * half), 2, half * b) for x in (here, there))
            self._steps.append((source[:, 0], source[:, 1], target[:, 0], target[:, 1]))
            here, there, half = there, here, 2 * half
        self._last = here
        self._length = torch.full((), math.sqrt(k), device=device)
        """A tensor: accelerators multiply by the reciprocal of a plain number, which rounds differently."""

    def __call__(self, x_bk: Tensor, out_bk: Tensor) -> Tensor:
        """`out_bk` (which may be `x_bk`) becomes the orthonormal transform of each row of `x_bk`; its own inverse."""
        self._first.copy_(x_bk.t())
        for first, second, total, difference in self._steps:
            torch.add(first, second, out=total)
            torch.sub(first, second, out=difference)
        return out_bk.copy_(self._last.div_(self._length).t())


def hadamard(x_bk: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each row; its own inverse. k is a power of two."""
    b, k = x_bk.shape
    return Rotation(b, k, x_bk.device)(x_bk, torch.empty_like(x_bk))
