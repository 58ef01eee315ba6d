"""What codecs there are, and how many bytes numbers take on a wire. No torch: plans and codecs both read it."""

from typing import Literal

CodecName = Literal[
    "fp32", "bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "delta-int8", "delta-int4", "lowrank"
]
OuterCodecName = Literal["fp32", "bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "topk"]
"""Codecs of what worker groups send each other once a round."""
BLOCK_CODECS = ("int8", "int4", "int4-hadamard", "e3m0")
"""Codecs with a scale for each block of numbers; `block` and `rounding` are theirs."""
Rounding = Literal["nearest", "stochastic"]


def returned_as(codec: str) -> str:
    """The codec of what worker groups' contributions, sent with `codec`, add up to: as many bytes as those take.

    e3m0 is off by up to a third of every number. That is averaged over the groups in what they send, but not in their
    mean, which therefore goes back as int4: of normally distributed numbers, blocks of 128, that loses 1.4 % of the power,
    e3m0 3.7 %.
    """
    return "int4" if codec == "e3m0" else codec


TOPK_CHUNK, TOPK_SHARE = 4096, 64
"""`topk` keeps one in TOPK_SHARE of every TOPK_CHUNK numbers."""


def topk_kept(n: int) -> tuple[int, int, int]:
    """(whole chunks, numbers kept in a whole chunk, numbers kept in the rest, which is a chunk of its own)."""
    rest = n % TOPK_CHUNK
    return n // TOPK_CHUNK, TOPK_CHUNK // TOPK_SHARE, -(-rest // TOPK_SHARE)


def wire_bytes(codec: str, n: int, *, block: int, element_bytes: int) -> int:
    """Bytes of n numbers on the wire: their codes, packed, and a 16-bit scale for each block of the block codecs.

    `topk`: 14 bits for each number kept (where it is, its sign, which of two magnitudes), packed by chunk, and the two
    magnitudes of each chunk in 16 bits each.
    Raises ValueError for `lowrank`, whose bytes depend on the shapes of matrices.
    """
    if codec == "lowrank":
        raise ValueError("the bytes of lowrank depend on the matrices' shapes, not on how many numbers there are")
    name = codec.removeprefix("delta-")
    if name in ("bf16", "fp16"):
        return 2 * n
    if name == "int8":
        return n + 2 * -(-n // block)
    if name in ("int4", "int4-hadamard", "e3m0"):
        return -(-n // 2) + 2 * -(-n // block)
    if name == "topk":
        chunks, kept, rest = topk_kept(n)
        return chunks * (-(-kept * 14 // 8) + 4) + (-(-rest * 14 // 8) + 4 if rest else 0)
    return element_bytes * n
