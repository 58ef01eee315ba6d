"""What codecs there are, and how many bytes numbers take on a wire. No torch: plans and codecs both read it."""

from typing import Literal

CodecName = Literal[
    "fp32", "bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "delta-int8", "delta-int4", "lowrank"
]
Rounding = Literal["nearest", "stochastic"]


def wire_bytes(codec: str, n: int, *, block: int, element_bytes: int) -> int:
    """Bytes of n numbers on the wire: their codes, packed, and a 16-bit scale for each block of the block codecs.

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
    return element_bytes * n
