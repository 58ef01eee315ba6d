"""How numbers become bytes on a wire: the interface, and the identity."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Flat tensors to bytes and back. The same input gives the same bytes on every device."""

    @property
    def name(self) -> str: ...

    @property
    def definition(self) -> str:
        """All that its bytes depend on, besides numbers and seed."""
        ...

    def encode(self, x_n: Tensor, *, seed: int = 0) -> Tensor:
        """(n,) floating point -> (wire_bytes(n),) uint8, codes and scales together.

        `seed`: what stochastic rounding draws from, besides the position.
        """
        ...

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """(wire_bytes(n),) uint8 -> (n,) of `dtype`."""
        ...

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, *, add: bool = False) -> None:
        """`out_n` becomes the sum of what the rows of (r, wire_bytes(n)) uint8 decode to, in their order.

        With `add` the sum begins with what `out_n` holds.
        """
        ...

    def wire_bytes(self, n: int) -> int:
        """Bytes that n elements take on the wire, exactly."""
        ...


class Identity:
    """Numbers travel as they are; collectives take a shortcut around `encode` and `decode`."""

    name, definition = "identity", "identity"

    def encode(self, x_n: Tensor, *, seed: int = 0) -> Tensor:
        return x_n.contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return coded.view(dtype)

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, *, add: bool = False) -> None:
        if not add:
            out_n.copy_(coded_rc[0].view(out_n.dtype))
        for coded in coded_rc if add else coded_rc[1:]:
            out_n.add_(coded.view(out_n.dtype))

    def wire_bytes(self, n: int) -> int:
        return 4 * n


IDENTITY: Codec = Identity()


class Raw:
    """Numbers as elements of one type, whatever type the receiver reads them as."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = self.definition = "fp32"
        self._dtype = dtype

    def encode(self, x_n: Tensor, *, seed: int = 0) -> Tensor:
        return x_n.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        # A message's numbers begin behind its header, where their type may not be aligned: hence the copy.
        return coded.clone().view(self._dtype)[:n].to(dtype)

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, *, add: bool = False) -> None:
        sum_decoded(self.decode, coded_rc, out_n, add=add)

    def wire_bytes(self, n: int) -> int:
        return n * self._dtype.itemsize


def sum_decoded(
    decode: Callable[[Tensor, int, torch.dtype], Tensor], coded_rc: Tensor, out_n: Tensor, *, add: bool = False
) -> None:
    """`out_n` becomes the sum of what the rows decode to, in their order, decoded one after the other."""
    for row, coded in enumerate(coded_rc):
        (out_n.add_ if row or add else out_n.copy_)(decode(coded, out_n.numel(), out_n.dtype))
