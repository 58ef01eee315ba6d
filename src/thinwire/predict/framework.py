"""What a training framework does that costs depend on: thinwire itself, and those whose published runs we predict."""

from dataclasses import dataclass, replace

from thinwire.plan.optimizers import OptimizerConfig


@dataclass(frozen=True)
class Framework:
    """Habits of a runtime. Bytes are per parameter."""

    name: str
    grad_bytes: float = 4.0
    """Gradient sums in memory."""
    grad_wire_bytes: float = 4.0
    """Gradients on the wire where no codec is named."""
    optimizer_bytes: float = 12.0
    """Master weights and the optimizer's states, of AdamW two moments."""
    flash_attention: bool = True
    """Attention scores are never stored, and a causal kernel does half of the square."""
    dropout: bool = False
    """Masks of a block's two dropouts are kept."""
    sequence_parallel: bool = True
    """Outside its matmuls a tensor-parallel block is cut along the sequence (arXiv 2205.05198)."""
    overlap_reduce: bool = True
    """Gradients are reduced behind backward."""
    overlap_refresh: bool = True
    """New weights are gathered behind the next forward."""
    broadcast_refresh: bool = False
    """New weights come by one broadcast from each owner, not by one gather."""
    prefetch: bool = True
    """The next unit's weights are gathered behind this unit's compute."""
    fused_elementwise: bool = False
    """Chains of element-wise operations run as one kernel (torch.compile)."""
    whole_table_grad: bool = False
    """Each micro-batch makes the embedding's gradient as a whole table, not only the rows of its tokens."""
    tied_units: bool = False
    """A tied table stays whole from forward to backward, and the final norm is then a unit of its own."""
    logits_bytes: float = 12.0
    """Per logit at the peak: fp32 log-softmax, the gradient that comes and the one that is made of it."""
    fused_loss: bool = False
    """Head and loss are one function over chunks of tokens, which makes the gradients in forward (`model/loss.py`)."""
    cut_logits_bytes: float = 12.0
    """The same where tensor-parallel ranks each hold a part of the vocabulary."""
    casts_on_gather: bool = False
    """Weights in the compute precision exist only where they are gathered; sharded ones are the fp32 masters."""
    packed_qkv: bool = False
    """Queries, keys and values are made in one buffer, which the values keep alive whole."""
    keeps_gathered_inputs: bool = False
    """Inputs that sequence parallelism gathers for a matmul are kept whole for backward, not gathered again."""


THINWIRE = Framework("thinwire", whole_table_grad=True, tied_units=True, packed_qkv=True, fused_loss=True)
"""With AdamW."""


def thinwire_with(optimizer: OptimizerConfig) -> Framework:
    """thinwire with the states of another optimizer, in fp32; its seconds are still those of AdamW, which takes longest."""
    return replace(THINWIRE, optimizer_bytes=4.0 * (1 + optimizer.state_numbers))


MEGATRON_2021 = Framework(
    "Megatron-LM and Megatron-DeepSpeed, 2021-23",
    grad_wire_bytes=2.0,
    flash_attention=False,
    dropout=True,
    sequence_parallel=False,
    overlap_reduce=False,
    overlap_refresh=False,
)
"""arXiv 2104.04473: scores stored, whole-gradient all-reduce after the last backward."""
DEEPSPEED_ZERO3 = Framework(
    "DeepSpeed ZeRO-3, 2021", grad_bytes=2.0, grad_wire_bytes=2.0, flash_attention=False, dropout=True
)
"""arXiv 2104.04473, table 2: without model parallelism."""
TORCHTITAN = Framework(
    "torchtitan, 2024",
    fused_elementwise=True,
    logits_bytes=14.0,
    cut_logits_bytes=18.0,
    casts_on_gather=True,
    keeps_gathered_inputs=True,
)
"""FSDP2 and DTensor. Its log reports what the allocator has reserved (`max_reserved_gib` in its metrics.py).

The block of the half-precision logits is too small for an fp32 buffer of the loss, so its 2 bytes stay reserved beside 12;
beside the 16 of torch's loss parallelism (log-softmax, its gradient's two terms, their sum, or that sum and its product)
the block of the fp32 logits is used again by one of these, but one more is asked for while all are taken: 2 + 16.
"""
INTERNEVO = Framework(
    "InternEvo, 2024",
    grad_bytes=2.0,
    grad_wire_bytes=2.0,
    optimizer_bytes=16.0,
    broadcast_refresh=True,
    overlap_refresh=False,
)
"""A hybrid-precision optimizer with an fp32 copy of the gradients."""
