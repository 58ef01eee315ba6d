"""What a block keeps from forward to backward. Korthikanti et al., arXiv 2205.05198, section 4, and its Llama likeness.

Per token and element of the hidden size, in units of the compute precision's bytes (2 in the paper). A GPT block keeps 17
(34 bytes): 5 outside its matmuls' tensor-parallel region (inputs of the two norms, of qkv and of the first linear, and
masks), 12 inside. A Llama block keeps both norms' inputs and outputs outside; rotated queries and keys, values, the
attention's output, gate, up, the gate's activation and their product inside; fused code does not keep the activation.
Scores that are stored add 5 a s / h bytes (scores, softmax, dropout mask).
"""

from thinwire.cost.candidate import Candidate, Setting
from thinwire.model.work import kept_inside, kept_outside


def score_elements(setting: Setting) -> float:
    """Elements per token of stored attention scores over all heads; none when the kernel never writes them."""
    if setting.framework.flash_attention:
        return 0.0
    return 2.5 * setting.spec.heads * setting.tokens


def block_elements(setting: Setting, tensor: int) -> tuple[float, float]:
    """(elements per token kept by a block without its scores, its scores), on one of `tensor` ranks."""
    outside = kept_outside(setting.spec) / (tensor if setting.framework.sequence_parallel else 1)
    inside = kept_inside(setting.spec, fused=setting.framework.fused_elementwise)
    return outside + inside / tensor, score_elements(setting) / tensor


def block_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes a block keeps of one micro-batch on one rank, the mean over blocks if not all are recomputed."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    plain, scores = block_elements(setting, candidate.tensor)
    stored = tokens * setting.compute_bytes * (plain + (0.0 if candidate.recompute == "selective" else scores))
    if candidate.recompute != "full":
        return stored
    share = 1.0 / candidate.recompute_every
    return share * input_bytes(setting, candidate) + (1.0 - share) * stored


def whole_block_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes of a block that is live again while it is recomputed."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    return tokens * setting.compute_bytes * sum(block_elements(setting, candidate.tensor))


def input_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes of a block's input for one micro-batch: what full recompute keeps."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    cut = candidate.tensor if setting.framework.sequence_parallel else 1
    return tokens * setting.compute_bytes * setting.spec.hidden / cut
