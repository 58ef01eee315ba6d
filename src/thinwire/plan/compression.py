"""The compression: which codec numbers travel with at each level, and how many bytes they take then. No torch."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from thinwire.config import Frozen

CodecName = Literal[
    "fp32", "bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "delta-int8", "delta-int4", "lowrank"
]
OuterCodecName = Literal["fp32", "bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "topk"]
"""Codecs of what worker groups send each other once a round."""
BLOCK_CODECS = ("int8", "int4", "int4-hadamard", "e3m0")
"""Codecs with a scale for each block of numbers; `block` and `rounding` are theirs."""
Rounding = Literal["nearest", "stochastic"]


class Compression(Frozen):
    """How numbers travel: a codec per level and direction; what is not named travels as it is."""

    weights: Mapping[str, CodecName] = Field(default_factory=dict)
    grads: Mapping[str, CodecName] = Field(default_factory=dict)
    block: Literal[64, 128, 256] = 128
    """Numbers that share a scale."""
    rank: int = Field(default=4, ge=1, le=10**5)
    """Columns of the two matrices that `lowrank` sends for each one."""
    rank_from: int = Field(default=2, ge=0, le=10**12)
    """Steps at the start whose gradients are summed in full before `lowrank` begins (PyTorch: `start_powerSGD_iter`)."""
    rounding: Rounding = "nearest"
    error_feedback: bool = False
    """Carry what the outermost compressed gradient hop loses over to the next step."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for level, codec in self.weights.items():
            if codec == "lowrank":
                raise ValueError(
                    f"weights.{level} = 'lowrank': it sums gradients, it cannot carry weights; use it in grads"
                )
        for level, codec in self.grads.items():
            if codec.startswith("delta-"):
                raise ValueError(
                    f"grads.{level} = {codec!r}: a delta needs something the receiver holds; use it for weights"
                )
        return self

    @property
    def coded(self) -> bool:
        """Whether any level has a codec that needs whole blocks."""
        return any(
            codec not in ("fp32", "bf16", "fp16", "lowrank") for codec in (*self.weights.values(), *self.grads.values())
        )

    @property
    def whole_steps(self) -> int:
        """Steps at the start that send more than those after them."""
        return self.rank_from if "lowrank" in self.grads.values() else 0

    def over(self, named: "Compression") -> "Compression":
        """This, and at levels that it does not name the codecs of `named`."""
        weights, grads = {**named.weights, **self.weights}, {**named.grads, **self.grads}
        return self.model_copy(update={"weights": weights, "grads": grads})


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


def __getattr__(name: str) -> Any:
    if name != "Wire":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("Wire is Compression now; the old name works for one more release", FutureWarning, stacklevel=2)
    return Compression
