"""What a GPU's threads do to blocks of numbers, in Triton. `kernels` launches these and says why the bits are right.

Shapes: R blocks that one program treats, K numbers of a block
"""

import triton
import triton.language as tl

from thinwire.comm.codecs import rng

_SPLITMIX = tuple(tl.constexpr(x) for x in (rng.GOLDEN, rng.MIX1, rng.MIX2))
_GOLDEN, _MIX1, _MIX2 = _SPLITMIX
_INFINITY = tl.constexpr(0x7F800000)
_NAN_SCALE = tl.constexpr(0x7FC0)
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 x 2^23: adding it leaves the nearest whole number, ties to even, in the low bits."""
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def butterfly(x_RK, R: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr):
    """Sum and difference of the numbers that lie HALF apart, in their places."""
    first, second = tl.split(tl.permute(tl.reshape(x_RK, (R, K // (2 * HALF), 2, HALF)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (R, K))


@triton.jit
def rotated(x_RK, length, R: tl.constexpr, K: tl.constexpr, LOG2_K: tl.constexpr):
    """Walsh-Hadamard transform of each row: butterflies in the order of `rotation`, then one division."""
    for step in tl.static_range(LOG2_K):
        x_RK = butterfly(x_RK, R, K, 1 << step)
    return tl.div_rn(x_RK, length)


@triton.jit
def noise(at, first):
    """Numbers in [0, 1) for the positions `at`: what `rng` draws, 24 bits of splitmix64."""
    x = (at + first).to(tl.uint64, bitcast=True) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIX1
    x = (x ^ (x >> 27)) * _MIX2
    return (x >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def linear_codes(units, at, first, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Whole numbers: the nearest, or at random the one below or above."""
    if STOCHASTIC:
        drawn = units + noise(at, first)
        cut = drawn.to(tl.int32)  # towards zero; `tl.floor` would take denormals for zeros
        codes = tl.minimum(tl.maximum(cut - (drawn < cut.to(tl.float32)).to(tl.int32), -LARGEST), LARGEST)
    else:
        codes = (units + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
    return codes


@triton.jit
def power_codes(units, at, first, STOCHASTIC: tl.constexpr):
    """0, or the sign and 1 + the exponent above 2^-6: the nearer value, or at random the one below or above."""
    bits = units.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if STOCHASTIC:
        exponent = bits >> 23
        low = tl.where(exponent > 120, exponent << 23, 0).to(tl.float32, bitcast=True)
        up = noise(at, first) * tl.maximum(low, 0.015625) < bits.to(tl.float32, bitcast=True) - low
        codes = tl.minimum(tl.maximum(exponent - 120, 0) + up.to(tl.int32), 7)
    else:
        halves = tl.minimum(tl.maximum(bits >> 22, 239), 255) - 239
        codes = tl.maximum(halves >> 1, tl.minimum(halves, 1))
    return tl.where(units < 0, -codes, codes)


@triton.jit(do_not_specialize=["first"])
def encode_blocks(
    x_ptr, coded_ptr, n, blocks, codes_c, first, length, R: tl.constexpr, K: tl.constexpr, LOG2_K: tl.constexpr,
    LARGEST: tl.constexpr, NIBBLES: tl.constexpr, POWERS: tl.constexpr, ROTATE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """n numbers to codes_c bytes of codes and 2 bytes of scale for each of the blocks; `first` is the seed's position."""
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    at_RK = row_R[:, None] * K + tl.arange(0, K)[None, :]
    x_RK = tl.load(x_ptr + at_RK, mask=at_RK < n, other=0.0).to(tl.float32)
    if ROTATE:
        x_RK = rotated(x_RK, length, R, K, LOG2_K)
    largest_R = tl.max(x_RK.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    ratio_R = tl.div_rn(largest_R.to(tl.float32, bitcast=True), LARGEST * 1.0).to(tl.int32, bitcast=True)
    scale_R = tl.where(largest_R > _INFINITY, _NAN_SCALE, (ratio_R + 0xFFFF) >> 16)
    finite_R = scale_R < (_INFINITY >> 16)
    divisor_R = tl.where(finite_R & (scale_R > 0), (scale_R << 16).to(tl.float32, bitcast=True), 1.0)
    units_RK = tl.div_rn(tl.where(finite_R[:, None], x_RK, 0.0), divisor_R[:, None])
    if POWERS:
        codes_RK = power_codes(units_RK, at_RK, first, STOCHASTIC)
    else:
        codes_RK = linear_codes(units_RK, at_RK, first, LARGEST, STOCHASTIC)
    codes_RK = tl.where(at_RK < n, codes_RK, 0)
    if NIBBLES:
        low, high = tl.split(tl.reshape(codes_RK & 15, (R, K // 2, 2)))
        byte_at = row_R[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
        tl.store(coded_ptr + byte_at, (low | (high << 4)).to(tl.uint8), mask=byte_at < codes_c)
    else:
        tl.store(coded_ptr + at_RK, (codes_RK & 255).to(tl.uint8), mask=at_RK < codes_c)
    scale_ptr = coded_ptr + codes_c + 2 * row_R  # may be odd: byte by byte
    tl.store(scale_ptr, (scale_R & 255).to(tl.uint8), mask=row_R < blocks)
    tl.store(scale_ptr + 1, (scale_R >> 8).to(tl.uint8), mask=row_R < blocks)


@triton.jit
def decoded(
    coded_ptr, row_R, blocks, codes_c, length, R: tl.constexpr, K: tl.constexpr, LOG2_K: tl.constexpr,
    NIBBLES: tl.constexpr, POWERS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """(R, K) fp32 of the blocks `row_R`; codes that are not there are zeros."""
    if NIBBLES:
        byte_at = row_R[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
        byte = tl.load(coded_ptr + byte_at, mask=byte_at < codes_c, other=0).to(tl.int32)
        codes_RK = (tl.reshape(tl.join(byte & 15, byte >> 4), (R, K)) ^ 8) - 8
    else:
        at_RK = row_R[:, None] * K + tl.arange(0, K)[None, :]
        codes_RK = (tl.load(coded_ptr + at_RK, mask=at_RK < codes_c, other=0).to(tl.int32) ^ 128) - 128
    scale_ptr = coded_ptr + codes_c + 2 * row_R
    low_R = tl.load(scale_ptr, mask=row_R < blocks, other=0).to(tl.int32)
    high_R = tl.load(scale_ptr + 1, mask=row_R < blocks, other=0).to(tl.int32)
    scale_R = ((low_R << 16) | (high_R << 24)).to(tl.float32, bitcast=True)
    if POWERS:
        size = tl.abs(codes_RK)
        value = tl.where(size > 0, (size + 120) << 23, 0).to(tl.float32, bitcast=True)
        units_RK = tl.where(codes_RK < 0, -value, value)
    else:
        units_RK = codes_RK.to(tl.float32)
    x_RK = units_RK * scale_R[:, None]
    if ROTATE:
        x_RK = rotated(x_RK, length, R, K, LOG2_K)
    return x_RK


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in another precision, to nearest, ties to even; bf16 by its bits, which Triton's interpreter would cut off."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > _INFINITY, _NAN_SCALE, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        kept = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        kept = x.to(DTYPE)
    return kept


@triton.jit
def sum_blocks(
    coded_ptr, out_ptr, n, blocks, codes_c, stride, ranks, length, R: tl.constexpr, K: tl.constexpr,
    LOG2_K: tl.constexpr, NIBBLES: tl.constexpr, POWERS: tl.constexpr, ROTATE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """n numbers: the sum over `ranks` rows, `stride` bytes apart, in their order and in the result's precision.

    With ADD it begins with what the result holds.
    """
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    kept: tl.constexpr = out_ptr.dtype.element_ty
    added: tl.constexpr = tl.float64 if kept == tl.float64 else tl.float32
    total_RK = decoded(coded_ptr, row_R, blocks, codes_c, length, R, K, LOG2_K, NIBBLES, POWERS, ROTATE)
    total_RK = rounded(total_RK, kept)
    at_RK = row_R[:, None] * K + tl.arange(0, K)[None, :]
    if ADD:
        held_RK = tl.load(out_ptr + at_RK, mask=at_RK < n, other=0)
        total_RK = rounded(held_RK.to(added) + total_RK.to(added), kept)
    for _ in range(1, ranks):
        coded_ptr += stride
        x_RK = decoded(coded_ptr, row_R, blocks, codes_c, length, R, K, LOG2_K, NIBBLES, POWERS, ROTATE)
        total_RK = rounded(total_RK.to(added) + rounded(x_RK, kept).to(added), kept)
    tl.store(out_ptr + at_RK, total_RK, mask=at_RK < n)
