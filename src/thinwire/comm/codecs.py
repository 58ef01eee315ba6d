"""Codecs: numbers to fewer bytes. Plain torch, the same bytes on every device; the reference of any fused kernel.

Block codecs share a bf16 scale among 64, 128 or 256 numbers: symmetric, scale = largest magnitude / largest code, rounded
up, so that nothing is ever clipped. A block with a NaN or an infinity decodes to NaN: never silently finite. On the wire:
all codes, packed, then all scales.

  int8, int4       linear codes -127..127, -7..7 (block sizes as in arXiv 2410.15526, far finer than ZeRO++'s)
  e3m0             sign and 3 exponent bits: 0 and scale x 2^-6 .. 2^0 (Streaming DiLoCo, arXiv 2501.18512)
  int4-hadamard    int4 after a Walsh-Hadamard rotation of each block, which spreads outliers (SDP4Bit, 2410.15526)
  bf16, fp16       a cast

Shapes: n numbers, b blocks, k numbers of a block, c bytes
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from thinwire.comm.codec import Codec
from thinwire.errors import PlanError
from thinwire.wire import Rounding, wire_bytes

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""splitmix64's constants (Steele et al. 2014), as signed 64-bit numbers."""


class Cast:
    """Numbers as bf16 or fp16, rounded to nearest."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.salt, self._dtype = name, 0, dtype

    def encode(self, x_n: Tensor) -> Tensor:
        return x_n.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return coded.view(self._dtype).to(dtype)

    def wire_bytes(self, n: int) -> int:
        return 2 * n


class Blocks:
    """The block codecs: `quantise` turns numbers in units of the block's scale into codes, `restore` back."""

    def __init__(
        self,
        name: str,
        *,
        block: int,
        rounding: Rounding,
        largest: float,
        quantise: Callable[[Tensor, Tensor | None], Tensor],
        restore: Callable[[Tensor], Tensor],
        nibbles: bool,
        rotate: bool = False,
    ) -> None:
        self.name, self.salt = name, 0
        self._block, self._stochastic, self._largest = block, rounding == "stochastic", largest
        self._quantise, self._restore, self._nibbles, self._rotate = quantise, restore, nibbles, rotate

    def wire_bytes(self, n: int) -> int:
        return wire_bytes(self.name, n, block=self._block, element_bytes=4)

    def encode(self, x_n: Tensor) -> Tensor:
        """(n,) floating point -> (wire_bytes(n),) uint8. Raises TypeError for integers."""
        if not x_n.is_floating_point():
            raise TypeError(f"{self.name} codes floating point numbers, not {x_n.dtype}")
        n = x_n.numel()
        x_bk = self._blocks(x_n.detach().float())
        if self._rotate:
            x_bk = hadamard(x_bk)
        scale_b = round_up_bf16(x_bk.abs().amax(dim=1) / self._largest)
        finite_b = torch.isfinite(scale_b)
        divisor_b = torch.where(finite_b & (scale_b > 0), scale_b, 1.0).float()
        units_bk = torch.where(finite_b[:, None], x_bk / divisor_b[:, None], 0.0)
        noise_bk = uniform(units_bk.numel(), self.salt, units_bk.device).view_as(units_bk) if self._stochastic else None
        codes_n = self._quantise(units_bk, noise_bk).view(-1)[:n]
        packed_c = pack(codes_n) if self._nibbles else codes_n.view(torch.uint8)
        return torch.cat([packed_c, scale_b.view(torch.uint8)])

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """(wire_bytes(n),) uint8 -> (n,) of `dtype`."""
        codes_c = -(-n // 2) if self._nibbles else n
        codes_n = unpack(coded[:codes_c], n) if self._nibbles else coded[:codes_c].view(torch.int8)
        scale_b = coded[codes_c:].clone().view(torch.bfloat16).float()
        units_bk = self._blocks(self._restore(codes_n))
        x_bk = units_bk * scale_b[:, None]
        if self._rotate:
            x_bk = hadamard(x_bk)
        return x_bk.view(-1)[:n].to(dtype)

    def _blocks(self, x_n: Tensor) -> Tensor:
        """(n,) -> (b, k), the last block filled with zeros."""
        short = -x_n.numel() % self._block
        return (torch.nn.functional.pad(x_n, (0, short)) if short else x_n).view(-1, self._block)


def make_codec(name: str, *, block: int = 128, rounding: Rounding = "nearest") -> Codec:
    """The codec called `name`. Raises PlanError if there is none."""
    if name in ("bf16", "fp16"):
        return Cast(name, torch.bfloat16 if name == "bf16" else torch.float16)
    if name == "int8":
        return Blocks(
            name,
            block=block,
            rounding=rounding,
            largest=127.0,
            quantise=_to_linear(127),
            restore=_from_linear,
            nibbles=False,
        )
    if name in ("int4", "int4-hadamard"):
        return Blocks(
            name, block=block, rounding=rounding, largest=7.0, quantise=_to_linear(7), restore=_from_linear, nibbles=True,
            rotate=name == "int4-hadamard",
        )  # fmt: skip
    if name == "e3m0":
        return Blocks(
            name, block=block, rounding=rounding, largest=1.0, quantise=_to_e3m0, restore=_from_e3m0, nibbles=True
        )
    raise PlanError(f"there is no codec {name!r}; there are bf16, fp16, int8, int4, int4-hadamard, e3m0")


def _to_linear(largest: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    def quantise(units: Tensor, noise: Tensor | None) -> Tensor:
        whole = units.round() if noise is None else (units + noise).floor()
        return whole.clamp(-largest, largest).to(torch.int8)

    return quantise


def _from_linear(codes: Tensor) -> Tensor:
    return codes.float()


def _to_e3m0(units: Tensor, noise: Tensor | None) -> Tensor:
    """Codes -7..7: 0, or the sign and 1 + the exponent above 2^-6. Between two values the nearer one, or by chance."""
    magnitude = units.abs()
    lower = ((magnitude.view(torch.int32) >> 23) - 120).clamp_(0, 7)  # the code whose value is just below
    low_value = _power(lower)
    share = (magnitude - low_value) / (_power(lower + 1) - low_value)
    up = share >= 0.5 if noise is None else noise < share
    code = (lower + up).clamp_(max=7).to(torch.int8)
    return torch.where(units < 0, -code, code)


def _from_e3m0(codes: Tensor) -> Tensor:
    return _power(codes.abs().int()) * codes.sign()


def _power(code: Tensor) -> Tensor:
    """The value of an int32 code: 2^(code - 7), 0 for code 0; its exponent bits are put together directly."""
    return torch.where(code > 0, ((code + 120) << 23).view(torch.float32), 0.0)


def pack(codes_n: Tensor) -> Tensor:
    """int8 codes -8..7, two in a byte, the first in the low half; an odd last one has zero beside it."""
    if codes_n.numel() % 2:
        codes_n = torch.nn.functional.pad(codes_n, (0, 1))
    pairs = codes_n.view(torch.uint8).view(-1, 2) & 0xF
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack(packed_c: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: (n,) int8."""
    halves = torch.stack([packed_c & 0xF, packed_c >> 4], dim=1).view(-1)[:n].to(torch.int8)
    return halves - ((halves & 8) << 1)


def round_up_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 that is not below x >= 0; NaN and infinity stay what they are."""
    near = x.to(torch.bfloat16)
    below = near.float() < x
    return (near.view(torch.int16) + below.to(torch.int16)).view(torch.bfloat16)


def hadamard(x_bk: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each row, by butterflies; its own inverse. k is a power of two."""
    b, k = x_bk.shape
    half = 1
    while half < k:
        pairs = x_bk.view(b, k // (2 * half), 2, half)
        x_bk = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(b, k)
        half *= 2
    return x_bk / math.sqrt(k)


def uniform(n: int, salt: int, device: torch.device) -> Tensor:
    """n numbers in [0, 1), a function of `salt` and the position alone: 24 bits of splitmix64."""
    x = (torch.arange(n, device=device) + salt * 1_000_003) * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    return _shifted(x ^ _shifted(x, 31), 40).float() / 2**24


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
