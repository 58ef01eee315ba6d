"""Top-k per chunk: the largest stay where they were, in as many bytes as the formula says; what is lost is fed back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.codecs.topk import TopK
from thinwire.plan.compression import TOPK_CHUNK, TOPK_SHARE, topk_kept

LENGTHS = st.one_of(
    st.integers(1, 200), st.sampled_from([TOPK_CHUNK - 1, TOPK_CHUNK, TOPK_CHUNK + 1, 3 * TOPK_CHUNK + 65])
)


def passed(x: Tensor) -> Tensor:
    codec = TopK()
    coded = codec.encode(x)
    assert coded.dtype == torch.uint8
    assert coded.numel() == codec.wire_bytes(x.numel())
    return codec.decode(coded, x.numel(), x.dtype)


def chunks_of(x: Tensor) -> list[Tensor]:
    return list(x.split(TOPK_CHUNK))


@given(LENGTHS, st.integers(0, 2**31))
def test_the_largest_of_each_chunk_stay_with_their_sign_and_nothing_else_does(n: int, seed: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    for chunk, out in zip(chunks_of(x), chunks_of(passed(x)), strict=True):
        kept = -(-len(chunk) // TOPK_SHARE)
        places = chunk.abs().topk(kept).indices
        assert torch.equal(out.nonzero().flatten(), places.sort().values)
        assert torch.equal(out[places].sign(), chunk[places].sign())


@given(LENGTHS, st.integers(0, 2**31))
def test_a_magnitude_is_the_mean_of_those_on_its_side_of_the_middle(n: int, seed: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    for chunk, out in zip(chunks_of(x), chunks_of(passed(x)), strict=True):
        places = out.nonzero().flatten()
        sizes = chunk[places].abs()
        large = sizes >= (sizes.max() + sizes.min()) / 2
        for side in (large, ~large):
            if side.any():
                torch.testing.assert_close(
                    out[places][side].abs(), sizes[side].mean().expand(int(side.sum())), rtol=2**-8, atol=0
                )


@pytest.mark.parametrize("n", [1, 63, 64, 65, TOPK_CHUNK, TOPK_CHUNK + 7])
def test_bytes_are_14_bits_for_each_number_kept_and_two_magnitudes_a_chunk(n: int) -> None:
    whole, kept, rest = topk_kept(n)
    expected = whole * (math.ceil(14 * kept / 8) + 4) + (math.ceil(14 * rest / 8) + 4 if rest else 0)
    assert TopK().wire_bytes(n) == expected


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    assert not passed(torch.zeros(5000)).any()
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(2 * TOPK_CHUNK)
        x[7] = bad
        first, second = chunks_of(passed(x))
        assert first.isnan().any()
        assert second.isfinite().all()


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_what_is_sent_and_what_is_left_are_what_was_put_in(n: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, generator=draw, dtype=torch.float64) for _ in range(5)]
    sent, residual = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for x in inputs:
        out = passed(x + residual)
        residual = x + residual - out
        sent += out
    torch.testing.assert_close(sent + residual, torch.stack(inputs).sum(0))
