"""Block codecs in plain torch: the reference of the fused kernels, and what runs where there are none.

A block of 64, 128 or 256 numbers shares a bf16 scale: largest magnitude / largest code, rounded up, so that nothing is
ever clipped. A block with a NaN or an infinity decodes to NaN: never silently finite. On the wire: all codes, packed,
then all scales. The work goes chunk by chunk through memory that stays in the cache.

The bits are those of IEEE arithmetic in a fixed order, hence the same on every device: one division for the scale, one
for each number, whole numbers and powers of two from there on; decoding multiplies a code of at most 7 bits by a scale
of 8, which is exact; only the rotation rounds, and its butterflies have one order. A NaN scale is always 0x7FC0.

Shapes: n numbers, b blocks, k numbers of a block, c bytes, r ranks

The Walsh-Hadamard rotation of blocks, by butterflies in a fixed order, so that its bits are the same everywhere.

Blocks are turned on their side first: each of the log2(k) steps then adds and subtracts long rows.

Shapes: b blocks, k numbers of a block (a power of two)
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.comm.codecs.rng import BITS, CounterRng
from thinwire.plan.compression import wire_bytes


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


_CPU_CHUNK, _OTHER_CHUNK = 1 << 17, 1 << 24
"""Numbers at a time: what stays in a core's cache (half as many where wider ones are made), and what bounds memory."""
_NAN_SCALE = 0x7FC0


@dataclass(frozen=True)
class BlockFormat:
    """What a block codec makes of numbers."""

    name: str
    block: int
    stochastic: bool
    largest: int
    """The largest code's value in units of the scale."""
    nibbles: bool = True
    powers: bool = False
    """Codes are 0 and powers of two from 2^-6 to 1 with a sign, not whole numbers."""
    rotate: bool = False

    def wire_bytes(self, n: int) -> int:
        return wire_bytes(self.name, n, block=self.block, element_bytes=4)

    def code_bytes(self, n: int) -> int:
        """Bytes of n codes, before the scales."""
        return -(-n // 2) if self.nibbles else n

    @cached_property
    def pairs(self) -> Tensor:
        """(256,) int64: for each byte the two fp32 values of its nibbles, the low one first."""
        code = (torch.arange(16) ^ 8) - 8
        value = torch.where(code == 0, 0.0, code.sign() * 2.0 ** (code.abs() - 7)) if self.powers else code.float()
        byte = torch.arange(256)
        return torch.stack([value[byte & 15], value[byte >> 4]], dim=1).view(torch.int64).view(-1)


def encode(x_n: Tensor, form: BlockFormat, seed: int) -> Tensor:
    """(n,) floating point -> (wire_bytes(n),) uint8."""
    n = x_n.numel()
    coded = torch.empty(form.wire_bytes(n), dtype=torch.uint8, device=x_n.device)
    codes_c, scales_c = coded[: form.code_bytes(n)], coded[form.code_bytes(n) :]
    x_bk = _whole_blocks(x_n.float(), form.block)
    most = _chunk(form, x_n.device)
    if form.rotate:
        x_bk = _rotated(x_bk, most)
    scale_b = _scales(x_bk, most, form)
    scales_c.copy_(scale_b.view(torch.uint8))
    _fill_codes(codes_c, x_bk, scale_b, most, form, seed)
    if form.nibbles and n % 2:
        codes_c[-1] &= 0xF
    return coded


def sum_into(coded_rc: Tensor, out_n: Tensor, form: BlockFormat, *, add: bool = False) -> None:
    """`out_n` becomes the sum of what the rows decode to, in their order, each rounded to `out_n`'s type first.

    With `add` the sum begins with what `out_n` holds.
    """
    n, k, device = out_n.numel(), form.block, out_n.device
    if n == 0:
        return
    most, codes_rc = _chunk(form, device), coded_rc[:, : form.code_bytes(n)]
    scale_rb1 = _as_bf16(coded_rc[:, codes_rc.shape[1] :]).float().unsqueeze(2)
    expand = _Expander(form, min(most, scale_rb1.shape[1]), device)
    of_chunk = zip(
        torch.split(out_n, most * k),
        torch.split(codes_rc, form.code_bytes(most * k), dim=1),
        torch.split(scale_rb1, most, dim=1),
        strict=True,
    )
    for target_n, codes, scales in of_chunk:
        for rank, (codes_c, scale_b1) in enumerate(zip(codes.unbind(), scales.unbind(), strict=True)):
            units_bk = expand(codes_c, len(scale_b1))
            _add_product(target_n, units_bk, scale_b1, begin=rank == 0 and not add, rotate=expand.rotation)


def _add_product(target_n: Tensor, units_bk: Tensor, scale_b1: Tensor, *, begin: bool, rotate: Rotation | None) -> None:
    """Add units x scale, rotated back, to `target_n`, or put it there. The product is exact, so fusing changes nothing."""
    plain = target_n.dtype == torch.float32 and target_n.numel() == units_bk.numel() and target_n.is_contiguous()
    if plain and rotate is None and begin:
        torch.mul(units_bk, scale_b1, out=target_n.view_as(units_bk))
    elif plain and rotate is None:
        target_n.view_as(units_bk).addcmul_(units_bk, scale_b1)
    else:
        numbers_bk = units_bk.mul_(scale_b1)
        numbers_bk = numbers_bk if rotate is None else rotate(numbers_bk, numbers_bk)
        part_n = numbers_bk.view(-1)[: target_n.numel()].to(target_n.dtype)
        (target_n.copy_ if begin else target_n.add_)(part_n)


def _chunk(form: BlockFormat, device: torch.device) -> int:
    """Blocks to treat at a time."""
    wide = form.stochastic or form.rotate
    return (_OTHER_CHUNK if device.type != "cpu" else _CPU_CHUNK // 2 if wide else _CPU_CHUNK) // form.block


def _whole_blocks(x_n: Tensor, k: int) -> Tensor:
    """(n,) -> (b, k), the last block filled with zeros."""
    short = -x_n.numel() % k
    return (torch.nn.functional.pad(x_n, (0, short)) if short else x_n).view(-1, k)


def _as_bf16(bytes_rc: Tensor) -> Tensor:
    """Rows of bytes, wherever they begin, as rows of bf16."""
    return torch.empty_like(bytes_rc, memory_format=torch.contiguous_format).copy_(bytes_rc).view(torch.bfloat16)


def _rotated(x_bk: Tensor, most: int) -> Tensor:
    out_bk = torch.empty_like(x_bk)
    rotation: Rotation | None = None
    for x, out in zip(torch.split(x_bk, most), torch.split(out_bk, most), strict=True):
        if rotation is None or rotation.blocks != len(x):
            rotation = Rotation(len(x), x.shape[1], x.device)
        rotation(x, out)
    return out_bk


def _scales(x_bk: Tensor, most: int, form: BlockFormat) -> Tensor:
    """(b,) bf16: the largest magnitude of each block in units of the largest code, rounded up."""
    largest_b = torch.empty(len(x_bk), device=x_bk.device)
    scratch_bk = torch.empty_like(x_bk[:most])
    for x, largest in zip(torch.split(x_bk, most), torch.split(largest_b, most), strict=True):
        torch.amax(torch.abs(x, out=scratch_bk[: len(x)]), dim=1, out=largest)
    return round_up_bf16(largest_b.div_(torch.full((), float(form.largest), device=x_bk.device)))


def _fill_codes(codes_c: Tensor, x_bk: Tensor, scale_b: Tensor, most: int, form: BlockFormat, seed: int) -> None:
    """The packed codes of all blocks."""
    finite_b = scale_b.isfinite()
    divisor_b1 = torch.where(finite_b & (scale_b > 0), scale_b, 1.0).float()[:, None]
    broken_b1 = None if x_bk.device.type == "cpu" and finite_b.all() else ~finite_b[:, None]
    quantise: _Quantiser | None = None
    first = 0
    targets = torch.split(codes_c, form.code_bytes(most * form.block))
    for x, divisor, target in zip(torch.split(x_bk, most), torch.split(divisor_b1, most), targets, strict=True):
        if quantise is None or len(quantise.units_bk) != len(x):
            quantise = _Quantiser(form, seed, len(x), x.device)
        torch.div(x, divisor, out=quantise.units_bk)
        if broken_b1 is not None:
            quantise.units_bk.masked_fill_(broken_b1[first : first + len(x)], 0.0)
        quantise(first * form.block, target)
        first += len(x)


class _Quantiser:
    """Turns numbers in units of their block's scale into packed codes, in memory that is used again."""

    def __init__(self, form: BlockFormat, seed: int, b: int, device: torch.device) -> None:
        self._form, n = form, b * form.block
        self._rng = CounterRng(seed, n, device) if form.stochastic else None
        self.units_bk = torch.empty(b, form.block, device=device)
        """Where the numbers are to be put before a call."""
        self._units = self.units_bk.view(-1)
        self._unit_bits = self._units.view(torch.int32)
        self._codes = torch.empty(n if form.nibbles else 0, dtype=torch.int8, device=device)
        self._halves = torch.empty(n // 2 if form.nibbles else 0, dtype=torch.int16, device=device)
        self._scratch = torch.empty(n if form.powers else 0, device=device)
        self._code, self._sign = (torch.empty_like(self._scratch, dtype=torch.int16) for _ in range(2))

    def __call__(self, start: int, target_c: Tensor) -> None:
        """Fill `target_c` with the codes of the numbers, of which the first has position `start`."""
        noise = None if self._rng is None else self._rng.whole(start, self._units.numel())
        codes = self._powers(noise) if self._form.powers else self._linear(noise)
        if self._form.nibbles:
            target_c.copy_(pack(self._codes.copy_(codes), self._halves)[: len(target_c)])
        else:
            target_c.view(torch.int8).copy_(codes[: len(target_c)])

    def _linear(self, noise: Tensor | None) -> Tensor:
        """Whole numbers: the nearest (none is beyond the largest), or at random the one below or above."""
        if noise is None:
            return self._units.round_()
        whole = self._units.add_(noise, alpha=2.0**-BITS).floor_()
        return whole.clamp_(-self._form.largest, self._form.largest)

    def _powers(self, noise: Tensor | None) -> Tensor:
        """0, or the sign and 1 + the exponent above 2^-6. Between two values the nearer one, or at random."""
        code, sign, bits = self._code, self._sign, self._scratch.view(torch.int32)
        if noise is None:
            # the sign, the exponent and the highest bit of the mantissa decide; from 239 up they count codes in halves
            sign.copy_(torch.bitwise_right_shift(self._unit_bits, 22, out=bits))
            torch.bitwise_and(sign, 0x1FF, out=code).clamp_(239, 255).sub_(239)
            torch.maximum(code >> 1, code.clamp_(max=1), out=code)
        else:
            self._up_at_random(noise, bits)
            sign.copy_(torch.bitwise_right_shift(self._unit_bits, 31, out=bits))
        sign.bitwise_right_shift_(15)
        return code.bitwise_xor_(sign).sub_(sign)

    def _up_at_random(self, noise: Tensor, bits: Tensor) -> None:
        """The code below, and one more where noise x (distance of the values) < number - value below.

        Both sides are exact (the right one by Sterbenz' lemma), and so is the sign of their difference. Nothing else is:
        1 + noise takes 25 bits.
        """
        low = bits.view(torch.float32)
        torch.bitwise_and(self._unit_bits, 0x7F800000, out=bits)
        torch.threshold_(low, 2.0**-7, 0.0)
        wanted = noise.mul_(low.clamp(min=2.0**-6)).mul_(2.0**-BITS)
        above = self._units.abs().sub_(low).sub_(wanted)
        up = above.view(torch.int32).clamp_(0, 1)
        self._code.copy_(bits.bitwise_right_shift_(23).sub_(120).clamp_(min=0).add_(up).clamp_(max=7))


class _Expander:
    """Turns packed codes into numbers in units of their block's scale, in memory that is used again."""

    def __init__(self, form: BlockFormat, most: int, device: torch.device) -> None:
        self._form, self._device = form, device
        self._units = torch.empty(most * form.block, device=device)
        self._pairs = form.pairs.to(device) if form.nibbles else None
        self._index = torch.empty(most * form.block // 2 if form.nibbles else 0, dtype=torch.int32, device=device)
        self.rotation: Rotation | None = None
        """What turns the latest result back."""

    def __call__(self, codes_c: Tensor, b: int) -> Tensor:
        """(b, k) fp32; what is beyond the last code is zero. Good until the next call."""
        n, c = b * self._form.block, len(codes_c)
        units_n = self._units[:n]
        if self._form.rotate and (self.rotation is None or self.rotation.blocks != b):
            self.rotation = Rotation(b, self._form.block, self._device)
        if self._pairs is None:
            units_n[:c].copy_(codes_c.view(torch.int8))
            units_n[c:].zero_()
        else:
            index_c = self._index[: n // 2]
            index_c[:c].copy_(codes_c)
            index_c[c:].zero_()
            torch.index_select(self._pairs, 0, index_c, out=units_n.view(torch.int64))
        return units_n.view(b, self._form.block)


def pack(codes_n: Tensor, out_c: Tensor) -> Tensor:
    """int8 codes -8..7, an even number of them, two in a byte, the first in the low half. Overwrites `codes_n`.

    The bytes are the low ones of `out_c`, int16, which is returned.
    """
    pairs = codes_n.view(torch.int16).bitwise_and_(0x0F0F)
    return torch.bitwise_right_shift(pairs, 4, out=out_c).bitwise_or_(pairs)


def unpack(packed_c: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: (n,) int8."""
    halves = torch.stack([packed_c & 0xF, packed_c >> 4], dim=1).view(-1)[:n].to(torch.int8)
    return (halves ^ 8) - 8


def round_up_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 that is not below x >= 0; infinity stays what it is, and every NaN becomes 0x7FC0."""
    bits = x.float().view(torch.int32).add(0xFFFF).bitwise_right_shift_(16)
    return torch.where(x.isnan(), _NAN_SCALE, bits).to(torch.int16).view(torch.bfloat16)
