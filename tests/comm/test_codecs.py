"""Codecs: error bounds, honest non-finite numbers, unbiased chance, exact sizes, nothing lost with error feedback."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.codecs.blocks import hadamard, pack, round_up_bf16, unpack
from thinwire.comm.codecs.codec import make_codec
from thinwire.comm.codecs.rng import CounterRng, uniform
from thinwire.errors import PlanError
from thinwire.plan.compression import wire_bytes

NAMES = ["bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0"]
BLOCKED = NAMES[2:]
STEP = {"int8": 1 / 127, "int4": 1 / 7}
"""Distance of two codes as a share of the block's largest magnitude."""

sizes = st.integers(1, 700)
seeds = st.integers(0, 2**31)


def numbers(n: int, seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(spread * torch.randn(n, generator=generator))
    x[torch.rand(n, generator=generator) < 0.05] = 0.0
    return x


def there_and_back(codec: object, x: Tensor, *, seed: int = 0) -> Tensor:
    return codec.decode(codec.encode(x, seed=seed), x.numel(), x.dtype)  # type: ignore[attr-defined]


@given(st.sampled_from(NAMES), sizes, seeds, st.sampled_from([64, 128, 256]))
@settings(max_examples=150)
def test_bytes_on_the_wire_are_the_formulas(name: str, n: int, seed: int, block: int) -> None:
    coded = make_codec(name, block=block).encode(numbers(n, seed))
    bits = {"bf16": 16, "fp16": 16, "int8": 8}.get(name, 4)
    scales = 2 * math.ceil(n / block) if name in BLOCKED else 0
    assert coded.dtype == torch.uint8
    assert coded.numel() == math.ceil(n * bits / 8) + scales == wire_bytes(name, n, block=block, element_bytes=4)
    assert make_codec(name, block=block).wire_bytes(n) == coded.numel()


@given(st.sampled_from(["int8", "int4"]), sizes, seeds, st.sampled_from(["nearest", "stochastic"]))
@settings(max_examples=150)
def test_linear_codes_are_within_half_a_step_or_a_whole_one_by_chance(
    name: str, n: int, seed: int, rounding: str
) -> None:
    x = numbers(n, seed)
    error = (there_and_back(make_codec(name, rounding=rounding), x) - x).abs()  # type: ignore[arg-type]
    for first in range(0, n, 128):
        block = slice(first, first + 128)
        step = x[block].abs().max() * STEP[name] * (1 + 2**-7)  # the scale is rounded up to 8 bits
        assert error[block].max() <= step * (0.5 if rounding == "nearest" else 1.0) * (1 + 1e-5)


@given(sizes, seeds)
@settings(max_examples=100)
def test_e3m0_rounds_to_the_nearest_power_of_its_scale(n: int, seed: int) -> None:
    x = numbers(n, seed)
    back = there_and_back(make_codec("e3m0"), x)
    for first in range(0, n, 128):
        block = x[first : first + 128]
        scale = round_up_bf16(block.abs().max()[None]).float()
        values = torch.cat([torch.zeros(1), scale * 2.0 ** torch.arange(-6, 1)])
        nearest = values[(block.abs()[:, None] - values).abs().argmin(dim=1)]
        got = back[first : first + 128].abs()
        assert torch.allclose((got - block.abs()).abs(), (nearest - block.abs()).abs(), rtol=1e-5)


def test_e3m0_takes_at_most_four_and_a_quarter_bits() -> None:
    assert 8 * make_codec("e3m0").wire_bytes(1_000_000) / 1_000_000 <= 4.25


def test_the_largest_of_an_e3m0_block_is_never_cut_down() -> None:
    for seed in range(20):
        x = numbers(128, seed)
        at = x.abs().argmax()
        assert x[at].abs() <= there_and_back(make_codec("e3m0"), x)[at].abs() <= x[at].abs() * (1 + 2**-7)


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_not_finite_decodes_to_nan(name: str, bad: float) -> None:
    x = numbers(300, 1)
    x[200] = bad
    back = there_and_back(make_codec(name), x)
    assert back[128:256].isnan().all()
    assert back[:128].isfinite().all()
    assert back[256:].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero_and_tiny_numbers_stay_finite(name: str) -> None:
    assert not there_and_back(make_codec(name), torch.zeros(130)).any()
    tiny = torch.full((130,), 1e-42)
    back = there_and_back(make_codec(name), tiny)
    assert back.isfinite().all()
    assert back.abs().max() < 1e-38


@pytest.mark.parametrize("name", BLOCKED)
def test_rounding_by_chance_is_unbiased_and_repeats_with_its_seed(name: str) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    codec = make_codec(name, rounding="stochastic")
    draws = [there_and_back(codec, x, seed=seed) for seed in range(400)]
    mean, deviation = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    drawn = deviation > 0
    assert drawn.float().mean() > 0.8
    assert ((mean - x).abs() <= 6 * deviation / math.sqrt(400))[drawn].all()
    bias = (mean - x).sum() / (deviation.square().sum().sqrt() / math.sqrt(400))
    assert bias.abs() < 5
    assert torch.equal(there_and_back(codec, x, seed=7), draws[7])


def test_the_counter_based_numbers_are_uniform() -> None:
    drawn = torch.cat([uniform(10_000, seed, torch.device("cpu")) for seed in range(5)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.histc(drawn, 20, 0, 1).std() / 2500 < 0.05


def test_the_counter_based_numbers_depend_on_seed_and_position_alone() -> None:
    whole = uniform(1000, 5, torch.device("cpu"))
    pieces = CounterRng(5, 300, torch.device("cpu"))
    for start, end in ((0, 300), (300, 450), (450, 451), (900, 1000)):
        assert torch.equal(pieces.whole(start, end - start) / 2**24, whole[start:end])
    # splitmix64 by the letter, in Python's whole numbers
    for position in (0, 1, 999):
        x = (position + 5 * 1_000_003) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        assert whole[position] == ((x ^ (x >> 31)) >> 40) / 2**24


def golden_numbers() -> Tensor:
    """Numbers that any machine makes alike: ordinary ones, denormals, zeros, a NaN, an infinity, an odd end."""
    i = torch.arange(1601)
    x = ((i * 7919) % 2001 - 1000).float() * 2.0 ** ((i * 31) % 19 - 14)
    x[256:300] = ((i[256:300] * 7919) % 90001).int().view(torch.float32)
    x[512:768] = 0.0
    x[800], x[1100] = math.nan, -math.inf
    return x


GOLDEN = {
    ("int8", "nearest"): "feeef4144a9ce798",
    ("int8", "stochastic"): "a79dc9625617996d",
    ("int4", "nearest"): "cd19cbeb877e9137",
    ("int4", "stochastic"): "38d347570ce52127",
    ("int4-hadamard", "nearest"): "08a6f9d5db81db11",
    ("int4-hadamard", "stochastic"): "248e520db697e64d",
    ("e3m0", "nearest"): "43da0841478a7739",
    ("e3m0", "stochastic"): "29fb27c8c9d42360",
}


@pytest.mark.parametrize(("name", "rounding"), GOLDEN)
def test_the_bytes_never_change(name: str, rounding: str) -> None:
    digest = hashlib.sha256()
    for block in (64, 128, 256):
        codec = make_codec(name, block=block, rounding=rounding)  # type: ignore[arg-type]
        digest.update(bytes(codec.encode(golden_numbers(), seed=3).tolist()))
    assert digest.hexdigest()[:16] == GOLDEN[name, rounding]


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_long_tensors_are_coded_as_their_parts_would_be(name: str, rounding: str) -> None:
    n = 150_001  # more than one chunk
    x = numbers(n, 4)
    codec = make_codec(name, rounding=rounding)  # type: ignore[arg-type]
    back = there_and_back(codec, x)
    assert torch.equal(back[:128], there_and_back(codec, x[:128]))
    if rounding == "nearest":
        for first in (65_536 - 128, 65_536, 131_072, 149_888):
            assert torch.equal(back[first : first + 128], there_and_back(codec, x[first : first + 128]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_coded_rows_are_sums_of_what_they_decode_to(name: str, dtype: torch.dtype) -> None:
    codec, n = make_codec(name), 70_001
    coded = torch.stack([codec.encode(numbers(n, seed)) for seed in range(3)])
    out = torch.full((n,), math.nan, dtype=dtype)
    codec.sum_into(coded, out)
    expected = codec.decode(coded[0], n, dtype)
    for row in coded[1:]:
        expected += codec.decode(row, n, dtype)
    assert torch.equal(out, expected)
    codec.sum_into(coded, out, add=True)
    for row in coded:
        expected += codec.decode(row, n, dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", BLOCKED)
def test_nothing_is_coded_to_nothing(name: str) -> None:
    codec = make_codec(name)
    assert codec.encode(torch.zeros(0)).numel() == 0
    assert codec.decode(torch.zeros(0, dtype=torch.uint8), 0, torch.float32).numel() == 0


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=99))
@settings(max_examples=80)
def test_packing_is_undone_by_unpacking(codes: list[int]) -> None:
    even = torch.tensor(codes + [0] * (len(codes) % 2), dtype=torch.int8)
    packed = pack(even, torch.empty(len(even) // 2, dtype=torch.int16)).to(torch.uint8)
    assert unpack(packed, len(codes)).tolist() == codes


def test_the_hadamard_rotation_is_the_matrix() -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < 64:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.arange(192.0).view(3, 64).sin()
    assert torch.allclose(hadamard(x), x @ matrix / 8, atol=1e-5)


def test_the_hadamard_rotation_keeps_lengths_and_undoes_itself() -> None:
    x = numbers(256, 3).view(2, 128)
    assert torch.allclose(hadamard(x).norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(hadamard(hadamard(x)), x, rtol=1e-4, atol=1e-3)


def test_the_rotation_helps_where_tails_are_heavy() -> None:
    x = numbers(1 << 16, 0, spread=1.0)
    plain, turned = (there_and_back(make_codec(name), x) - x for name in ("int4", "int4-hadamard"))
    assert turned.norm() < 0.8 * plain.norm()


@pytest.mark.parametrize("name", BLOCKED)
def test_error_feedback_loses_nothing_over_time(name: str) -> None:
    codec, residual, sent, put_in = make_codec(name), torch.zeros(300), torch.zeros(300), torch.zeros(300)
    for seed in range(12):
        x = numbers(300, seed, spread=0.5)
        put_in += x
        out = there_and_back(codec, x + residual)
        residual = x + residual - out
        sent += out
    assert torch.allclose(sent + residual, put_in, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKED)
def test_integers_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="codes floating point numbers"):
        make_codec(name).encode(torch.arange(5))


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(PlanError, match="there is no codec 'int3'"):
        make_codec("int3")
