"""What a training framework does that costs depend on: thinwire itself, and those whose published runs we predict."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Framework:
    """Habits of a runtime. Bytes are per parameter."""

    name: str
    grad_bytes: float = 4.0
    """Gradient sums in memory."""
    grad_wire_bytes: float = 4.0
    """Gradients on the wire where no codec is named."""
    optimizer_bytes: float = 12.0
    """Master weights and AdamW's two moments."""
    flash_attention: bool = True
    """Attention scores are never stored, and a causal kernel does half of the square."""
    sequence_parallel: bool = True
    """Outside its matmuls a tensor-parallel block is cut along the sequence (arXiv 2205.05198)."""
    overlap_reduce: bool = True
    """Gradients are reduced behind backward."""
    overlap_refresh: bool = True
    """New weights are gathered behind the next forward."""
    prefetch: bool = True
    """The next unit's weights are gathered behind this unit's compute."""
    fused_elementwise: bool = False
    """Chains of element-wise operations run as one kernel (torch.compile)."""
    logits_bytes: float = 14.0
    """Per logit at the peak: half-precision logits, their fp32 copy, its softmax and the gradient."""


THINWIRE = Framework("thinwire")
MEGATRON_2021 = Framework(
    "Megatron-LM and Megatron-DeepSpeed, 2021-23",
    grad_wire_bytes=2.0,
    flash_attention=False,
    sequence_parallel=False,
    overlap_reduce=False,
    overlap_refresh=False,
)
"""arXiv 2104.04473: scores stored, whole-gradient all-reduce after the last backward."""
