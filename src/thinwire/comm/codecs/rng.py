"""Counter-based random numbers: the same on every device, a function of seed and position alone, 24 bits each.

The numbers are the top 24 bits of splitmix64 (Steele et al. 2014) of seed x 1,000,003 + position. Its last step, an xor
with itself shifted right by 31, cannot reach those bits and is left out.
"""

import torch
from torch import Tensor

SPREAD, GOLDEN, MIX1, MIX2 = 1_000_003, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS = 24


class CounterRng:
    """Draws for positions in chunks of at most `most`, in memory that is used again for each chunk."""

    def __init__(self, seed: int, most: int, device: torch.device) -> None:
        self._first = seed * SPREAD
        self._strides = torch.arange(most, device=device).mul_(signed(GOLDEN))
        self._x, self._y = (torch.empty(most, dtype=torch.int64, device=device) for _ in range(2))
        self._bits = torch.empty(most, dtype=torch.int32, device=device)
        self._noise = torch.empty(most, device=device)

    def whole(self, start: int, n: int) -> Tensor:
        """(n,) fp32 whole numbers in 0 .. 2^24 - 1 for the positions from `start`; good until the next call."""
        x, y, bits = self._x[:n], self._y[:n], self._bits[:n]
        noise: Tensor = self._noise[:n]
        torch.add(self._strides[:n], signed((start + self._first) * GOLDEN), out=x)
        for shift, factor in ((30, MIX1), (27, MIX2)):
            torch.bitwise_right_shift(x, shift, out=y)
            x.bitwise_xor_(y.bitwise_and_((1 << (64 - shift)) - 1)).mul_(signed(factor))
        bits.copy_(x.bitwise_right_shift_(64 - BITS)).bitwise_and_((1 << BITS) - 1)
        noise.copy_(bits)
        return noise


def uniform(n: int, seed: int, device: torch.device) -> Tensor:
    """n numbers in [0, 1) for the positions 0 .. n - 1."""
    return CounterRng(seed, n, device).whole(0, n) * 2.0**-BITS


def signed(x: int) -> int:
    """x modulo 2^64 as a signed 64-bit number."""
    return (x + 2**63) % 2**64 - 2**63
