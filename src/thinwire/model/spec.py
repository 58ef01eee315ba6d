"""What a model is, without torch: shapes, exact parameter counts, and what a pass through a block computes and keeps.

Two families: `llama` (RMSNorm, rotary positions, SwiGLU, grouped-query attention; arXiv 2302.13971, 2307.09288) and
`gpt2` (LayerNorm, learned positions, GELU, biases; Radford et al. 2019). Names and order of the parameters are those of
`model/transformer.py`; a test builds models and compares. Costs are made from a block's counts (matmuls by shape,
attention, elements that are kept), and a probe divides its timings by them.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from thinwire.config import Frozen

Family = Literal["llama", "gpt2"]
MOST = 2**31 - 1
"""Token ids and positions are 32-bit numbers."""


class RopeScaling(Frozen):
    """Stretched rotary positions: `linear` divides them by `factor`; `llama3` as in Llama 3.1 (by wavelength)."""

    kind: Literal["linear", "llama3"]
    factor: float = Field(ge=1e-6, le=1e6)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_tokens: int = 8192


class UnitSpec(NamedTuple):
    """A block of the model whose states move together: its name prefix and the names of its parameters."""

    name: str
    parameters: tuple[str, ...]


class ModelSpec(Frozen):
    """Every shape of a decoder-only transformer."""

    family: Family = "llama"
    vocab_size: int = Field(ge=1, le=MOST)
    hidden: int = Field(ge=1, le=10**7)
    layers: int = Field(ge=1, le=10**4)
    heads: int = Field(ge=1, le=10**6)
    kv_heads: int = Field(ge=1, le=10**6)
    head_size: int = Field(ge=1, le=10**6)
    ffn: int = Field(ge=1, le=10**8)
    max_tokens: int = Field(ge=1, le=MOST)
    tied: bool = False
    """The output head is the embedding."""
    norm_eps: float = Field(default=1e-5, ge=1e-30, le=1)
    rope_theta: float = Field(default=10000.0, ge=1, le=1e15)
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    """A bias in attention's output projection (Llama and Qwen3 with `attention_bias`)."""
    ffn_bias: bool = False
    """Biases in the feed-forward layers (Llama with `mlp_bias`)."""
    bias: bool = False
    """Biases in every linear layer but the head (GPT-2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen3)."""
    init_std: float = Field(default=0.02, gt=0, le=1e3)

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}")
        if self.family == "llama" and self.head_size % 2:
            raise ValueError(f"head_size = {self.head_size} is odd; rotary positions need pairs")
        return self

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, in the model's order; a tied head has none of its own."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, self.hidden)}
        if self.family == "gpt2":
            shapes["positions.weight"] = (self.max_tokens, self.hidden)
        for layer in range(self.layers):
            shapes |= {f"blocks.{layer}.{name}": shape for name, shape in self._block_shapes()}
        shapes |= {f"norm.{name}": shape for name, shape in self._norm_shapes(self.hidden)}
        if not self.tied:
            shapes["head.weight"] = (self.vocab_size, self.hidden)
        return shapes

    def _norm_shapes(self, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "weight", (size,)
        if self.family == "gpt2":
            yield "bias", (size,)

    def _linear_shapes(self, name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        if bias:
            yield f"{name}.bias", (out,)

    def _block_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        for name, shape in self._norm_shapes(self.hidden):
            yield f"attention_norm.{name}", shape
        yield from self._linear_shapes("attention.qkv", queries + 2 * keys, self.hidden, self.qkv_bias or self.bias)
        if self.qk_norm:
            yield "attention.query_norm.weight", (self.head_size,)
            yield "attention.key_norm.weight", (self.head_size,)
        yield from self._linear_shapes("attention.out", self.hidden, queries, self.out_bias or self.bias)
        for name, shape in self._norm_shapes(self.hidden):
            yield f"ffn_norm.{name}", shape
        up = 2 * self.ffn if self.family == "llama" else self.ffn
        yield from self._linear_shapes("ffn.up", up, self.hidden, self.ffn_bias or self.bias)
        yield from self._linear_shapes("ffn.down", self.hidden, self.ffn, self.ffn_bias or self.bias)

    @property
    def parameters(self) -> int:
        """Exact count of parameters."""
        outside = self.vocab_size * self.hidden * (1 if self.tied else 2)
        outside += self.max_tokens * self.hidden if self.family == "gpt2" else 0
        outside += sum(math.prod(shape) for _, shape in self._norm_shapes(self.hidden))
        return outside + self.layers * self.parameters_per_block

    @property
    def parameters_per_block(self) -> int:
        return sum(math.prod(shape) for _, shape in self._block_shapes())

    def units(self) -> list[UnitSpec]:
        """Embedding, each block, final norm, head; a tied head is part of the embedding."""
        found: dict[str, list[str]] = {}
        for name in self.parameter_shapes():
            first, second = name.split(".")[:2]
            found.setdefault(f"{first}.{second}" if first == "blocks" else first, []).append(name)
        return [UnitSpec(unit, tuple(names)) for unit, names in found.items()]

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: all linear layers and the head (tied or not), not lookups or norms."""
        block = sum(math.prod(shape) for name, shape in self._block_shapes() if len(shape) == 2)
        return self.layers * block + self.vocab_size * self.hidden

    def forward_flops_per_token(self, tokens: int, *, causal: bool = False) -> float:
        """FLOPs of one forward per token in a sequence of `tokens`: 2 per multiplied parameter, plus attention.

        Attention is QK^T and AV: 4 x tokens x heads x head_size per layer (Megatron, arXiv 2104.04473, appendix; PaLM,
        arXiv 2204.02311, appendix B). `causal` counts only the half that a causal kernel computes; published
        utilisation figures mostly count all of it, so that is the default.
        """
        attention = 4.0 * tokens * self.heads * self.head_size * self.layers
        return 2.0 * self.matmul_parameters + (attention / 2 if causal else attention)

    def model_flops_per_token(self, tokens: int, *, causal: bool = False) -> float:
        """FLOPs of forward and backward per token, recomputation not counted: the numerator of MFU. Three forwards."""
        return 3.0 * self.forward_flops_per_token(tokens, causal=causal)


CPU_CHUNK, CHUNK = (128, 2**17), (4096, 2**27)
"""Of the loss: the fewest tokens of a chunk, and the logits that it has where a small vocabulary lets more tokens in.

So many tokens that adding up the gradient of the head's weights (8 V D bytes a chunk) is small beside its 6 C V D FLOPs; so
many logits as stay in a core's cache, or fill an accelerator.
"""
KERNELS = 30
"""Kernels of one eager forward of a block; backward launches twice as many."""


def loss_chunk(vocabulary: int, *, cpu: bool) -> int:
    """Tokens whose logits are there at a time where head and loss are one function (`model/loss.py`)."""
    tokens, logits = CPU_CHUNK if cpu else CHUNK
    return max(tokens, logits // vocabulary)


def linear_shapes(spec: ModelSpec, tensor: int = 1) -> Iterator[tuple[float, float]]:
    """(columns out, columns in) of a block's matmuls on one of `tensor` ranks."""
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    up = spec.ffn if spec.family == "gpt2" else 2 * spec.ffn
    yield (queries + 2 * keys) / tensor, spec.hidden
    yield spec.hidden, queries / tensor
    yield up / tensor, spec.hidden
    yield spec.hidden, spec.ffn / tensor


def linear_weights(spec: ModelSpec, tensor: int = 1) -> float:
    """Weights of those matmuls."""
    return sum(out * into for out, into in linear_shapes(spec, tensor))


def causal_core_flops(spec: ModelSpec, sequences: float, rows: float, tokens: float, tensor: int = 1) -> float:
    """Scores and their product with the values, of `rows` queries to `tokens` keys; a causal kernel does half of them."""
    return 2.0 * rows * tokens * spec.head_size * sequences * spec.heads / tensor


def every_second_matmul(spec: ModelSpec) -> tuple[float, float, float]:
    """Of a block's matmuls one by one, the first, the third and so on, torchtitan's choice of what is kept.

    (elements per token that they make inside the tensor-parallel region, and outside of it; share of all matmuls' work
    that the others are).
    """
    queries, keys, hidden = spec.heads * spec.head_size, spec.kv_heads * spec.head_size, spec.hidden
    first = [queries + 2 * keys] if spec.family == "gpt2" else [queries, keys, keys]
    ups = [spec.ffn] * (1 if spec.family == "gpt2" else 2)
    made = (
        [(out, hidden) for out in first] + [(hidden, queries)] + [(out, hidden) for out in ups] + [(hidden, spec.ffn)]
    )
    whole = {len(first), len(made) - 1}  # the two that leave the region: attention's and the last one
    inside = sum(out for place, (out, _) in enumerate(made) if place % 2 == 0 and place not in whole)
    outside = sum(out for place, (out, _) in enumerate(made) if place % 2 == 0 and place in whole)
    again = sum(out * into for out, into in made[1::2]) / sum(out * into for out, into in made)
    return float(inside), float(outside), again


def kept_outside(spec: ModelSpec, *, dropout: bool = False) -> float:
    """Elements per token kept outside the tensor-parallel region, without scores; dropout keeps two masks of bytes."""
    return (5.0 if dropout else 4.0) * spec.hidden


def kept_inside(spec: ModelSpec, *, fused: bool = False) -> float:
    """Elements per token kept inside the tensor-parallel region, without scores; fused code keeps no activation."""
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    if spec.family == "gpt2":
        return 2.0 * queries + 2.0 * keys + 2.0 * spec.ffn
    return 2.0 * queries + 2.0 * keys + (3.0 if fused else 4.0) * spec.ffn
