"""What a block keeps from forward to backward. Korthikanti et al., arXiv 2205.05198, section 4, and its Llama likeness.

Per token and element of the hidden size, in units of the compute precision's bytes (2 in the paper). A GPT block keeps 17
(34 bytes): 5 outside its matmuls' tensor-parallel region (inputs of the two norms, of qkv and of the first linear, and
masks, where there is dropout), 12 inside. A Llama block keeps both norms' inputs and outputs outside; rotated queries and
keys, values, the attention's output, gate, up, the gate's activation and their product inside; fused code does not keep
the activation.
Scores that are stored add 5 a s / h bytes (scores, softmax, dropout mask).
"""

from thinwire.model.spec import every_second_matmul, kept_inside, kept_outside, loss_chunk
from thinwire.predict.candidate import Candidate, Setting


def score_elements(setting: Setting) -> float:
    """Elements per token of stored attention scores over all heads; none when the kernel never writes them."""
    if setting.framework.flash_attention:
        return 0.0
    return 2.5 * setting.spec.heads * setting.tokens


def block_elements(setting: Setting, tensor: int) -> tuple[float, float]:
    """(elements per token kept by a block without its scores, its scores), on one of `tensor` ranks."""
    outside = kept_outside(setting.spec, dropout=setting.framework.dropout) / _token_parts(setting, tensor)
    inside = kept_inside(setting.spec, fused=setting.framework.fused_elementwise)
    gathered = 2.0 * _gathered_input(setting, tensor)  # of attention and of the feed-forward layers
    return outside + inside / tensor + gathered, score_elements(setting) / tensor


def held_elements(setting: Setting, tensor: int) -> float:
    """Elements per token that backward does not need, or could make, and that stay in memory all the same.

    Queries and keys before their rotation, where they lie in one buffer with the values; on a CPU, whose RMSNorm is made
    of single operations, what each of both norms has before its weights. Tested: tests/planner/test_own_runs.py.
    """
    spec = setting.spec
    packed = setting.framework.packed_qkv and spec.family != "gpt2"
    before_rotation = (spec.heads + spec.kv_heads) * spec.head_size / tensor if packed else 0.0
    return before_rotation + 2.0 * _unweighted(setting, tensor)


def _unweighted(setting: Setting, tensor: int) -> float:
    made = setting.cluster.device.kind == "cpu" and setting.spec.family != "gpt2"
    return setting.spec.hidden / _token_parts(setting, tensor) if made else 0.0


def block_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes a block keeps of one micro-batch on one rank, the mean over blocks if not all are recomputed."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    plain, scores = block_elements(setting, candidate.tensor)
    plain += held_elements(setting, candidate.tensor)
    stored = tokens * setting.compute_bytes * (plain + (0.0 if candidate.recompute == "selective" else scores))
    if candidate.recompute == "per-op":
        inside, outside, _ = every_second_matmul(setting.spec)
        attention = setting.spec.heads * setting.spec.head_size
        kept = (inside + attention) / candidate.tensor + outside
        return tokens * setting.compute_bytes * kept + input_bytes(setting, candidate)
    if candidate.recompute != "full":
        return stored
    share = 1.0 / candidate.recompute_every
    return share * input_bytes(setting, candidate) + (1.0 - share) * stored


def full_block_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes of a block that is live again while it is recomputed."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    held = held_elements(setting, candidate.tensor)
    return tokens * setting.compute_bytes * (held + sum(block_elements(setting, candidate.tensor)))


def gradients_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes of the gradients that a block's backward has at once, in its feed-forward layers.

    Of the gate's activation and its two factors in a Llama block, of the activation and what it is made of in a GPT one.
    """
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    times = 2.0 if setting.spec.family == "gpt2" else 3.0
    return times * tokens * setting.compute_bytes * setting.spec.ffn / candidate.tensor


def input_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes of a block's input for one micro-batch: what full recompute keeps."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    return tokens * setting.compute_bytes * setting.spec.hidden / _token_parts(setting, candidate.tensor)


def head_bytes(setting: Setting, candidate: Candidate) -> float:
    """Bytes that the final norm and the head keep for backward of one micro-batch: the input of each."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    matmul = _gathered_input(setting, candidate.tensor) or setting.spec.hidden / _token_parts(setting, candidate.tensor)
    matmul += _unweighted(setting, candidate.tensor)
    return input_bytes(setting, candidate) + tokens * setting.compute_bytes * matmul


def fused_loss(setting: Setting, candidate: Candidate) -> bool:
    """Whether head and loss are one function: where no rank has only a part of the vocabulary."""
    return setting.framework.fused_loss and candidate.tensor == 1


def chunk_tokens(setting: Setting, candidate: Candidate) -> float:
    """Tokens whose logits are there at a time in a loss that is fused with the head."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    return min(tokens, float(loss_chunk(setting.spec.vocab_size, cpu=setting.cluster.device.kind == "cpu")))


def fused_loss_bytes(setting: Setting, candidate: Candidate) -> tuple[float, float]:
    """Bytes beside a fused loss's inputs (while its chunks are made, in its backward).

    A chunk of logits, and on a CPU their log-softmax and, of halves, their fp32 form; the gradient of the hidden states;
    fp32 sums of the weights' gradient. In backward the sums, what they become in the compute precision, and the gradient
    of the hidden states before and after its scaling.
    """
    spec, each = setting.spec, setting.compute_bytes
    exact = max(4, each)
    plain = (exact if each < exact else 0) + exact if setting.cluster.device.kind == "cpu" else 0
    logits = chunk_tokens(setting, candidate) * spec.vocab_size * (each + plain)
    sums = float(exact * spec.vocab_size * spec.hidden)
    hidden = input_bytes(setting, candidate)
    return logits + sums + hidden, sums + each * spec.vocab_size * spec.hidden + 2 * hidden


def _token_parts(setting: Setting, tensor: int) -> int:
    """Into how many parts tokens are split outside the matmuls of a tensor-parallel block."""
    return tensor if setting.framework.sequence_parallel else 1


def _gathered_input(setting: Setting, tensor: int) -> float:
    """Elements per token of a matmul's input that is kept as it was gathered; 0 where it is gathered again."""
    kept = tensor > 1 and setting.framework.sequence_parallel and setting.framework.keeps_gathered_inputs
    return float(setting.spec.hidden) if kept else 0.0
