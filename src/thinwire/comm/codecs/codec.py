"""Codecs: numbers to fewer bytes, the same bytes on every device.

  int8, int4       linear codes -127..127, -7..7 (block sizes as in arXiv 2410.15526, far finer than ZeRO++'s)
  e3m0             sign and 3 exponent bits: 0 and scale x 2^-6 .. 2^0 (Streaming DiLoCo, arXiv 2501.18512)
  int4-hadamard    int4 after a Walsh-Hadamard rotation of each block, which spreads outliers (SDP4Bit, 2410.15526)
  bf16, fp16       a cast

`blocks` has the arithmetic of the first four in plain torch; on a GPU where Triton is installed `kernels` does the same
in one pass, with the same bits. `topk` keeps the largest numbers, for outer rounds.

Shapes: n numbers, c bytes, r ranks
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from thinwire.comm.codecs import blocks
from thinwire.comm.codecs.blocks import BlockFormat
from thinwire.errors import PlanError
from thinwire.plan.compression import Rounding


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


class Raw:
    """Numbers as elements of one type, whatever type the receiver reads them as."""

    def __init__(self, dtype: torch.dtype, name: str = "fp32") -> None:
        self.name = self.definition = name
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


IDENTITY: Codec = Raw(torch.float32, "identity")
"""Numbers of any type travel as they are: collectives take a shortcut around it."""


def sum_decoded(
    decode: Callable[[Tensor, int, torch.dtype], Tensor], coded_rc: Tensor, out_n: Tensor, *, add: bool = False
) -> None:
    """`out_n` becomes the sum of what the rows decode to, in their order, decoded one after the other."""
    for row, coded in enumerate(coded_rc):
        (out_n.add_ if row or add else out_n.copy_)(decode(coded, out_n.numel(), out_n.dtype))


class Cast:
    """Numbers as bf16 or fp16, rounded to nearest."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.definition, self._dtype = name, name, dtype

    def encode(self, x_n: Tensor, *, seed: int = 0) -> Tensor:
        return x_n.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return coded.view(self._dtype).to(dtype)

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, *, add: bool = False) -> None:
        if not add:
            out_n.copy_(coded_rc[0].view(self._dtype))
        for coded in coded_rc if add else coded_rc[1:]:
            out_n.add_(coded.view(self._dtype).to(out_n.dtype))

    def wire_bytes(self, n: int) -> int:
        return 2 * n


class Arithmetic(Protocol):
    """How a block format is computed: `blocks` and `kernels` are such modules."""

    def encode(self, x_n: Tensor, form: BlockFormat, seed: int) -> Tensor: ...

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, form: BlockFormat, *, add: bool = False) -> None: ...


class Blocks:
    """A block codec."""

    def __init__(self, form: BlockFormat) -> None:
        self.name, self.definition, self.form = form.name, str(form), form
        self._arithmetic: dict[torch.device, Arithmetic] = {}

    def wire_bytes(self, n: int) -> int:
        return self.form.wire_bytes(n)

    def encode(self, x_n: Tensor, *, seed: int = 0) -> Tensor:
        """(n,) floating point -> (wire_bytes(n),) uint8. Raises TypeError for integers."""
        if not x_n.is_floating_point():
            raise TypeError(f"{self.name} codes floating point numbers, not {x_n.dtype}")
        return self._on(x_n.device).encode(x_n.detach(), self.form, seed)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """(wire_bytes(n),) uint8 -> (n,) of `dtype`."""
        out_n = torch.empty(n, dtype=dtype, device=coded.device)
        self.sum_into(coded[None], out_n)
        return out_n

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, *, add: bool = False) -> None:
        """`out_n` becomes the sum of what the rows of (r, wire_bytes(n)) decode to, each rounded to its type first."""
        self._on(out_n.device).sum_into(coded_rc, out_n, self.form, add=add)

    def _on(self, device: torch.device) -> Arithmetic:
        if device not in self._arithmetic:
            self._arithmetic[device] = arithmetic(device)
        return self._arithmetic[device]


def arithmetic(device: torch.device) -> Arithmetic:
    """The fused kernels where there are a GPU and Triton, else plain torch; the same bits either way."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return cast(Arithmetic, importlib.import_module("thinwire.comm.codecs.kernels"))
    return blocks


def make_codec(name: str, *, block: int = 128, rounding: Rounding = "nearest") -> Codec:
    """The codec called `name`. Raises PlanError if there is none."""
    stochastic = rounding == "stochastic"
    if name in ("bf16", "fp16"):
        return Cast(name, torch.bfloat16 if name == "bf16" else torch.float16)
    if name == "int8":
        return Blocks(BlockFormat(name, block, stochastic, largest=127, nibbles=False))
    if name in ("int4", "int4-hadamard"):
        return Blocks(BlockFormat(name, block, stochastic, largest=7, rotate=name == "int4-hadamard"))
    if name == "e3m0":
        return Blocks(BlockFormat(name, block, stochastic, largest=1, powers=True))
    raise PlanError(f"there is no codec {name!r}; there are bf16, fp16, int8, int4, int4-hadamard, e3m0")
