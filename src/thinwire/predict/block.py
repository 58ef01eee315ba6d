"""Seconds of one transformer block, of the embedding and of the head for one micro-batch on one rank, by cause.

Collectives over the hops of an axis take latency, and bytes over rate, level by level. With V bytes in all, fanouts k_1 ..
k_n and K_i their products, an all-gather sends V (k_i - 1) / K_i bytes from each rank at hop i; a reduce-scatter is its
mirror; an all-reduce is both. A ring needs k - 1 messages one after another; for small all-reduces a tree needs log2 k each
way, and the faster of the two is taken (NCCL does the same).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.model.spec import KERNELS, causal_core_flops, every_second_matmul, linear_shapes, linear_weights
from thinwire.predict.activations import block_elements, chunk_tokens, fused_loss
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.placement import Axes, Hop, matmul_s, touch_s

LOGIT_BYTES = 12.0
"""Touched per logit and pass by the loss."""


@dataclass(frozen=True)
class Causes:
    """Seconds of one pass, by cause; `total` is their sum."""

    matmul_s: float = 0.0
    memory_s: float = 0.0
    """Element-wise work, bound by the device's memory."""
    launch_s: float = 0.0
    """What launching kernels takes beyond the work itself."""
    tensor_s: float = 0.0
    """Collectives of the tensor axis: nothing hides them."""
    context_s: float = 0.0
    """What attention does not hide of the keys and values going round."""

    @property
    def total(self) -> float:
        return self.matmul_s + self.memory_s + self.launch_s + self.tensor_s + self.context_s

    @property
    def compute_s(self) -> float:
        return self.matmul_s + self.memory_s + self.launch_s

    def plus(self, other: "Causes", times: float = 1.0) -> "Causes":
        return Causes(
            self.matmul_s + times * other.matmul_s,
            self.memory_s + times * other.memory_s,
            self.launch_s + times * other.launch_s,
            self.tensor_s + times * other.tensor_s,
            self.context_s + times * other.context_s,
        )


@dataclass(frozen=True)
class Passes:
    """Forward and backward of one thing; backward includes what is recomputed."""

    forward: Causes
    backward: Causes


def block_passes(setting: Setting, candidate: Candidate, axes: Axes) -> Passes:
    """A block's forward and backward. Backward is two matmuls for one, and the recomputation that is asked for."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    linear = _linear_s(setting, tokens, candidate.tensor)
    core = _core_s(setting, candidate)
    memory = _memory_s(setting, candidate)
    weights = setting.calibration.weight_s * linear_weights(setting.spec, candidate.tensor)
    tensor = _tensor_s(setting, candidate, axes)
    ring = _ring_s(setting, candidate, axes)
    forward = _with_floor(Causes(linear + core, memory + weights, 0.0, tensor, max(0.0, ring - core)), setting, 1.0)
    touched = setting.calibration.memory_backward * memory + 2 * weights
    once = Causes(2 * (linear + core), touched, 0.0, tensor, max(0.0, 2 * ring - 2 * core))
    backward = _with_floor(once, setting, 2.0)
    if candidate.recompute == "full":
        return Passes(forward, backward.plus(forward, 1.0 / candidate.recompute_every))
    if candidate.recompute == "per-op":
        again = every_second_matmul(setting.spec)[2]
        return Passes(forward, backward.plus(Causes(again * linear, memory, 0.0, tensor / 2)))  # gathers, not sums
    if candidate.recompute == "selective" and not setting.framework.flash_attention:
        scores = _scores_memory_s(setting, candidate)
        return Passes(forward, backward.plus(Causes(core, scores)))
    return Passes(forward, backward)


def head_passes(setting: Setting, candidate: Candidate, axes: Axes) -> Passes:
    """Final norm, head and loss. Where head and loss are one, forward makes the gradients and backward scales them."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    columns = setting.spec.vocab_size / candidate.tensor
    multiply = matmul_s(tokens, columns, setting.spec.hidden, setting)
    each = setting.calibration.logit_s
    by_memory = touch_s(tokens * columns * LOGIT_BYTES / 2, setting)
    loss = by_memory if each is None else tokens * columns * each / 2
    tensor = all_reduce_s(tokens * setting.spec.hidden * setting.compute_bytes, axes.tensor)
    if not fused_loss(setting, candidate):
        return Passes(Causes(multiply, loss, 0.0, 0.0), Causes(2 * multiply, loss, 0.0, tensor))
    weights, moved = columns * setting.spec.hidden, tokens * setting.spec.hidden * setting.compute_bytes
    summing = touch_s(8 * weights * tokens / chunk_tokens(setting, candidate), setting)
    scaling = touch_s((4 + setting.compute_bytes) * weights + 2 * moved, setting)
    return Passes(Causes(3 * multiply, 2 * loss + summing, 0.0, 0.0), Causes(0.0, scaling, 0.0, tensor))


def embedding_passes(setting: Setting, candidate: Candidate, axes: Axes) -> Passes:
    """The lookup, and adding gradients up into its rows."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    moved = tokens * setting.spec.hidden * setting.compute_bytes
    tensor = all_reduce_s(moved, axes.tensor)
    rows = setting.spec.vocab_size * setting.spec.hidden / candidate.tensor * setting.compute_bytes
    # The gradient of the full table is made, and added to the head's if that is the same table.
    table = rows * (4 if setting.spec.tied and candidate.pipeline == 1 else 1) * setting.framework.full_table_grad
    backward = Causes(0.0, touch_s(6 * moved + table, setting))
    return Passes(Causes(0.0, touch_s(3 * moved, setting), 0.0, tensor), backward)


def _linear_s(setting: Setting, tokens: float, tensor: int) -> float:
    return sum(matmul_s(tokens, out, into, setting) for out, into in linear_shapes(setting.spec, tensor))


def _core_s(setting: Setting, candidate: Candidate) -> float:
    """Scores and their product with the values; a causal kernel does half of the square."""
    spec, rows = setting.spec, setting.tokens / candidate.context
    heads = candidate.micro_batch * spec.heads / candidate.tensor
    if setting.framework.flash_attention:
        assert setting.cluster.device.peak_flops_per_s
        flops = causal_core_flops(spec, candidate.micro_batch, rows, setting.tokens, candidate.tensor)
        share = (
            setting.calibration.matmul_efficiency * spec.head_size / (spec.head_size + setting.calibration.matmul_half)
        )
        return flops / (setting.cluster.device.peak_flops_per_s * share)
    scores = matmul_s(rows, setting.tokens, spec.head_size, setting, batch=heads)
    values = matmul_s(rows, spec.head_size, setting.tokens, setting, batch=heads)
    return scores + values


def _memory_s(setting: Setting, candidate: Candidate) -> float:
    """Every kept element is written once and read once."""
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    plain, scores = block_elements(setting, candidate.tensor)
    times = 1.2 if setting.framework.fused_elementwise else 2.0
    return touch_s(times * tokens * setting.compute_bytes * (plain + scores), setting)


def _scores_memory_s(setting: Setting, candidate: Candidate) -> float:
    tokens = candidate.micro_batch * setting.tokens / candidate.context
    return touch_s(2.0 * tokens * setting.compute_bytes * block_elements(setting, candidate.tensor)[1], setting)


def _tensor_s(setting: Setting, candidate: Candidate, axes: Axes) -> float:
    """Two all-reduces a pass (Megatron-LM, arXiv 1909.08053); as gathers and reduce-scatters they send the same bytes."""
    if candidate.tensor == 1:
        return 0.0
    moved = candidate.micro_batch * setting.tokens / candidate.context * setting.spec.hidden * setting.compute_bytes
    if setting.framework.sequence_parallel:
        return 4 * gather_s(moved, axes.tensor)
    return 2 * all_reduce_s(moved, axes.tensor)


def _ring_s(setting: Setting, candidate: Candidate, axes: Axes) -> float:
    """Keys and values of every other part of the sequence pass by once (ring attention, arXiv 2310.01889)."""
    if candidate.context == 1:
        return 0.0
    spec = setting.spec
    width = 2 * spec.kv_heads * spec.head_size / candidate.tensor
    full = candidate.micro_batch * setting.tokens * width * setting.compute_bytes
    slowest = axes.context[-1]
    part = full / candidate.context
    return (candidate.context - 1) * (part / (slowest.bytes_per_s * slowest.alone) + slowest.latency_s)


def _with_floor(causes: Causes, setting: Setting, launches: float) -> Causes:
    """On an accelerator launches run ahead of the work and are a floor under it; a CPU does one after the other."""
    kernels = KERNELS * launches / (3 if setting.framework.fused_elementwise else 1)
    floor = kernels * setting.calibration.launch_s
    hidden = 0.0 if setting.cluster.device.kind == "cpu" else causes.matmul_s + causes.memory_s
    missing = max(0.0, floor - hidden)
    return Causes(causes.matmul_s, causes.memory_s, missing, causes.tensor_s, causes.context_s)


def gather_hops(full_bytes: float, hops: Sequence[Hop]) -> list[float]:
    """Seconds at each hop of an all-gather (or of its mirror, a reduce-scatter) of `full_bytes`."""
    seconds, cumulative = [], 1
    for hop in hops:
        cumulative *= hop.fanout
        sent = full_bytes * (hop.fanout - 1) / cumulative
        seconds.append(sent / hop.bytes_per_s + (hop.fanout - 1) * hop.latency_s + hop.start_s)
    return seconds


def gather_s(full_bytes: float, hops: Sequence[Hop]) -> float:
    """Seconds of an all-gather or a reduce-scatter, hop after hop."""
    return sum(gather_hops(full_bytes, hops))


def all_reduce_s(full_bytes: float, hops: Sequence[Hop]) -> float:
    """Seconds of an all-reduce, hop after hop."""
    seconds, cumulative = 0.0, 1
    for hop in hops:
        cumulative *= hop.fanout
        part = full_bytes * hop.fanout / cumulative
        ring = 2 * part * (hop.fanout - 1) / hop.fanout / hop.bytes_per_s + 2 * (hop.fanout - 1) * hop.latency_s
        tree = 2 * part / hop.bytes_per_s + 2 * math.ceil(math.log2(hop.fanout)) * hop.latency_s
        seconds += min(ring, tree) + hop.start_s
    return seconds


def send_s(message_bytes: float, hops: Sequence[Hop]) -> float:
    """Seconds of a message to the next stage where it is slowest: over the outermost hop of the pipeline axis."""
    if not hops:
        return 0.0
    slowest = hops[-1]
    return message_bytes / (slowest.bytes_per_s * slowest.alone) + slowest.latency_s
