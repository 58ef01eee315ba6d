"""The block codecs as fused Triton kernels for GPUs: one pass over the numbers, and the bits of `blocks`.

Encoding reads each number once and writes its code; decoding and summing read each code once and write each sum once,
however many ranks there are. Needs the extra `gpu`.

Why the bits are equal: every operation is either exact or one correctly rounded IEEE operation in the same order.
Divisions are `div_rn` (Triton's `/` is approximate). Contraction of products and sums is switched off, and would change
nothing: no product rounds, since codes x scales, powers of two and 24-bit noise x powers of two are exact. Denormals are
kept. The largest magnitude and the scale's rounding are found on the bits as whole numbers, so NaNs are seen on every
device. Rounding to the nearest whole number adds and subtracts 1.5 x 2^23. The random numbers are whole-number
arithmetic. A decoded NaN is a NaN; which of the many is left to the device.

Shapes: n numbers, c bytes, r ranks
"""

import math

import torch
from torch import Tensor

from thinwire.comm.codecs.blocks import BlockFormat
from thinwire.comm.codecs.rng import SPREAD, signed
from thinwire.comm.codecs.triton_blocks import encode_blocks, sum_blocks

_NUMBERS = 2048
"""Numbers that one program treats: 16 for each of its 128 threads."""
OPTIONS = {"enable_fp_fusion": False}
"""For the compiler: no contraction of products and sums."""


def encode(x_n: Tensor, form: BlockFormat, seed: int) -> Tensor:
    """(n,) floating point -> (wire_bytes(n),) uint8."""
    x_n, n = x_n.contiguous(), x_n.numel()
    coded = torch.empty(form.wire_bytes(n), dtype=torch.uint8, device=x_n.device)
    if n:
        with torch.cuda.device_of(x_n):  # type: ignore[no-untyped-call]
            encode_blocks[_grid(n)](
                x_n, coded, n, -(-n // form.block), form.code_bytes(n), signed(seed * SPREAD), math.sqrt(form.block),
                **constants(form), LARGEST=form.largest, STOCHASTIC=form.stochastic, **OPTIONS,
            )  # fmt: skip
    return coded


def sum_into(coded_rc: Tensor, out_n: Tensor, form: BlockFormat, *, add: bool = False) -> None:
    """`out_n` becomes the sum of what the rows decode to, in their order, each rounded to `out_n`'s type first.

    With `add` the sum begins with what `out_n` holds.
    """
    n, target = out_n.numel(), out_n.contiguous()
    coded_rc = coded_rc if coded_rc.stride(1) == 1 else coded_rc.contiguous()
    if n:
        with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]
            sum_blocks[_grid(n)](
                coded_rc, target, n, -(-n // form.block), form.code_bytes(n), coded_rc.stride(0), len(coded_rc),
                math.sqrt(form.block), **constants(form), ADD=add, **OPTIONS,
            )  # fmt: skip
    if target.data_ptr() != out_n.data_ptr():
        out_n.copy_(target)


def _grid(n: int) -> tuple[int]:
    return (-(-n // _NUMBERS),)


def constants(form: BlockFormat) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    return {
        "R": _NUMBERS // form.block,
        "K": form.block,
        "LOG2_K": form.block.bit_length() - 1,
        "NIBBLES": form.nibbles,
        "POWERS": form.powers,
        "ROTATE": form.rotate,
    }
