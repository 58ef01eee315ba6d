"""What one pass through a block computes, counted: matmuls by shape, attention, elements that are kept. No torch.

Costs are made from these counts, and a probe divides its timings by them.
"""

from collections.abc import Iterator

from thinwire.model.spec import ModelSpec

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
