"""`loss.softmax_gradient_` in one Triton kernel: two reads and one write of each logit, in the logits' own precision.

One program treats a row: a first pass keeps the running maximum and the sum of exponentials below it (online softmax,
arXiv 1805.02867), a second one writes the gradient where the logit was. Sizes of blocks are Liger Kernel's (2410.10989).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 32768
"""Logits of a row that are treated at a time."""


@triton.jit
def softmax_gradient(
    logits_ptr, targets_ptr, losses_ptr, stride, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of one row; its logits become the gradient. A row whose target is negative has neither."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row * stride
    at = tl.arange(0, BLOCK)
    kept = row_ptr.dtype.element_ty
    if target < 0:
        for first in range(0, vocabulary, BLOCK):
            tl.store(row_ptr + first + at, tl.zeros([BLOCK], kept), mask=first + at < vocabulary)
        tl.store(losses_ptr + row, 0.0)
        return
    chosen = tl.load(row_ptr + target).to(tl.float32)
    most, total = float("-inf"), 0.0
    for first in range(0, vocabulary, BLOCK):
        x = tl.load(row_ptr + first + at, mask=first + at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a block of logits that are all masked
        total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base))
        most = higher
    log_sum = most + tl.log(total)
    for first in range(0, vocabulary, BLOCK):
        inside = first + at < vocabulary
        p = tl.exp(tl.load(row_ptr + first + at, mask=inside, other=float("-inf")).to(tl.float32) - log_sum)
        tl.store(row_ptr + first + at, tl.where(first + at == target, p - 1.0, p).to(kept), mask=inside)
    tl.store(losses_ptr + row, log_sum - chosen)


def softmax_gradient_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """What `loss.softmax_gradient_` does. The rows must be contiguous."""
    rows, vocabulary = logits_CV.shape
    losses_C = torch.empty(rows, device=logits_CV.device)
    block = min(MOST, triton.next_power_of_2(vocabulary))
    if rows:
        with torch.cuda.device_of(logits_CV):  # type: ignore[no-untyped-call]
            softmax_gradient[(rows,)](
                logits_CV, targets_C, losses_C, logits_CV.stride(0), vocabulary, BLOCK=block,
                num_warps=max(4, min(32, block // 1024)),
            )  # fmt: skip
    return losses_C.sum()
