"""What a probe times: shapes, sizes, and how often. No torch."""

from dataclasses import dataclass
from typing import NamedTuple

from thinwire.model.spec import ModelSpec

Shape = tuple[int, int, int]
CODECS = ("bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0")


class BlockShape(NamedTuple):
    """A Llama block and a micro-batch that goes through it; keys have half of the heads."""

    hidden: int
    heads: int
    ffn: int
    sequences: int
    tokens: int

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            vocab_size=2, hidden=self.hidden, layers=1, heads=self.heads, kv_heads=self.heads // 2, ffn=self.ffn,
            head_size=self.hidden // self.heads, max_tokens=self.tokens,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"a block of width {self.hidden}, {self.sequences} x {self.tokens} tokens"


@dataclass(frozen=True)
class Effort:
    """How much is timed."""

    shapes: tuple[Shape, ...]
    copies: tuple[int, ...]
    """Bytes copied."""
    chunks: tuple[int, ...]
    """Bytes one rank sends to each of the others."""
    repeats: int
    blocks: tuple[BlockShape, ...] = ()
    logits: tuple[int, int] = (128, 1024)
    """(tokens, vocabulary) of the loss."""
    numbers: int = 2**16
    """Numbers that are updated and taken over."""
    coded: int = 2**19
    """Most of these that are coded at a time."""
    codecs: tuple[str, ...] = ()

    @staticmethod
    def of(kind: str, *, quick: bool) -> "Effort":
        """For a device of `kind`."""
        if kind == "cpu":
            return QUICK if quick else FULL
        return GPU_QUICK if quick else GPU_FULL


QUICK = Effort(
    tuple((m, d, d) for m in (32, 256) for d in (64, 256)),
    (2**20, 2**24),
    (2**12, 2**16, 2**20, 2**22),
    repeats=5,
    blocks=(BlockShape(64, 2, 128, 1, 64), BlockShape(128, 4, 384, 2, 128), BlockShape(256, 4, 640, 2, 128)),
    numbers=2**18,
    codecs=CODECS,
)
FULL = Effort(
    tuple((m, d, n) for m in (64, 256, 1024) for d, n in ((64, 64), (256, 256), (512, 2048), (1024, 1024))),
    (2**20, 2**22, 2**24, 2**26),
    (2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**24),
    repeats=9,
    blocks=tuple(
        BlockShape(hidden, heads, ffn, sequences, tokens)
        for hidden, heads, ffn in ((128, 4, 384), (256, 4, 768), (512, 8, 1408))
        for sequences, tokens in ((1, 64), (1, 256), (4, 128))
    ),
    logits=(512, 4096),
    numbers=2**22,
    codecs=CODECS,
)
# An accelerator is full of work only with products of some thousands to a side: 8192 cubed takes 1.4 ms at 790 TFLOP/s.
GPU_QUICK = Effort(
    (*((m, d, d) for m in (256, 4096) for d in (1024, 4096)), (8192, 8192, 8192)),
    (2**26, 2**30),
    (2**12, 2**16, 2**20, 2**24, 2**26),
    repeats=5,
    blocks=(BlockShape(1024, 8, 4096, 4, 1024), BlockShape(2048, 16, 8192, 4, 2048)),
    logits=(4096, 32_000),
    numbers=2**26,
    coded=2**26,
    codecs=CODECS,
)
GPU_FULL = Effort(
    (
        *((m, d, n) for m in (64, 512, 4096) for d, n in ((1024, 1024), (4096, 4096), (4096, 16_384))),
        (8192, 8192, 8192),
    ),
    (2**24, 2**26, 2**28, 2**30),
    (2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28),
    repeats=9,
    blocks=tuple(
        BlockShape(hidden, heads, ffn, sequences, tokens)
        for hidden, heads, ffn in ((1024, 8, 4096), (2048, 16, 8192), (4096, 32, 14_336))
        for sequences, tokens in ((1, 1024), (4, 2048))
    ),
    logits=(8192, 32_000),
    numbers=2**28,
    coded=2**26,
    codecs=CODECS,
)
