"""Cross entropy summed over valid tokens, fused with the head that makes the logits, in chunks of tokens.

The head's product, the loss and the gradients of both are made in one forward, chunk by chunk, as in Liger Kernel (arXiv
2410.10989, section 3.2) and Cut Cross-Entropy (2411.09009): the loss is the end of the graph, so its gradient is known up
to the scalar that backward brings. Of tokens x vocabulary only one chunk of logits is ever there, in the precision of
the head; its fp32 form, where a kernel needs one, is a chunk too. What is kept for backward are the gradients of the
hidden states and of the weights, so backward needs neither logits nor the head's weights.

Precision: log-sum-exp and loss in fp32 (fp64 for fp64). The gradient of the logits is rounded to the head's precision
once, as autograd would, and the parts of the weights' gradient are added up in fp32.

B batch, T tokens, N = B x T, C tokens of a chunk, D hidden, V vocabulary
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from thinwire.model.spec import loss_chunk

IGNORED = -100
"""What the loader puts where nothing is scored; every negative target is left out."""


def linear_loss(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Sum (not mean) of -log softmax(x W^T + b)[target] over targets that are not negative; a scalar in at least fp32.

    Gradients reach `x_BTD`, `weight_VD` and `bias_V`, whichever want one; a second derivative is an error of torch.
    """
    x_ND, targets_N = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    kind = x_ND.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # the meta device has none
        dtype = torch.get_autocast_dtype(kind)
        x_ND, weight_VD, bias_V = x_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    given = (tensor for tensor in (x_ND, weight_VD, bias_V) if tensor is not None)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        loss: Tensor = _LinearLoss.apply(x_ND, weight_VD, bias_V, targets_N)  # type: ignore[no-untyped-call]
        return loss
    total = _zero(x_ND)
    for at in _chunks(x_ND, weight_VD.shape[0]):
        total += softmax_loss(F.linear(x_ND[at], weight_VD, bias_V), targets_N[at])
    return total


def token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """`linear_loss` of logits that are there already. The gradient is written once, in their precision, in backward."""
    logits_NV, targets_N = logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1)
    loss: Tensor = _LogitsLoss.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return loss


def softmax_loss(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The sum of -log softmax(logits)[target] over targets that are not negative."""
    known_C = targets_C.masked_fill(targets_C < 0, IGNORED)
    return F.cross_entropy(logits_CV.to(_exact(logits_CV)), known_C, ignore_index=IGNORED, reduction="sum")


def softmax_gradient_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The same sum; the logits become its gradient by them: softmax less one at the target, 0 in rows without one."""
    if _fused(logits_CV):
        from thinwire.model.triton_loss import softmax_gradient_ as fused

        return fused(logits_CV, targets_C)
    left_out_C1 = (targets_C < 0)[:, None]
    target_C1 = targets_C.clamp(min=0)[:, None]
    log_p_CV = torch.log_softmax(logits_CV.to(_exact(logits_CV)), dim=-1)
    chosen_C1 = log_p_CV.gather(1, target_C1)
    torch.exp(log_p_CV, out=logits_CV)
    logits_CV.scatter_(1, target_C1, torch.expm1(chosen_C1).to(logits_CV.dtype))  # p - 1 before it is rounded
    if logits_CV.device.type != "cpu" or left_out_C1.any():
        logits_CV.masked_fill_(left_out_C1, 0.0)
    return -chosen_C1.masked_fill_(left_out_C1, 0.0).sum()


class _LinearLoss(torch.autograd.Function):
    """Forward makes the gradients for an incoming gradient of 1; backward multiplies them by the one that comes."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        total = _zero(x_ND)
        grad_x_ND = torch.empty_like(x_ND) if wants_x else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_exact(weight_VD)) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=_exact(weight_VD)) if wants_bias and bias_V is not None else None
        for at in _chunks(x_ND, weight_VD.shape[0]):
            logits_CV = F.linear(x_ND[at], weight_VD, bias_V)
            total += softmax_gradient_(logits_CV, targets_N[at])
            if grad_x_ND is not None:
                torch.mm(logits_CV, weight_VD, out=grad_x_ND[at])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, logits_CV.t(), x_ND[at])
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(0, dtype=grad_bias_V.dtype)
        ctx.save_for_backward(grad_x_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if one is None else _times(one, grad, dtype) for one, dtype in made), None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        total = _zero(logits_NV)
        for at in _chunks(logits_NV, logits_NV.shape[1]):
            total += softmax_loss(logits_NV[at], targets_N[at])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for at in _chunks(logits_NV, logits_NV.shape[1]):
            grad_CV = grad_NV[at].copy_(logits_NV[at])
            softmax_gradient_(grad_CV, targets_N[at])
            grad_CV.mul_(grad)
        return grad_NV, None


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add a product to fp32 sums: inside the matmul where the device has one that does, else rounded once before."""
    if total_VD.dtype == left_VC.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif total_VD.is_cuda:
        torch.addmm(total_VD, left_VC, right_CD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD += left_VC @ right_CD


def _times(made: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times the one that comes, rounded to `dtype` once."""
    return torch.mul(made, grad.to(made.dtype), out=torch.empty_like(made, dtype=dtype))


def _chunks(rows: Tensor, vocabulary: int) -> Iterator[slice]:
    size = loss_chunk(vocabulary, cpu=rows.device.type == "cpu")
    return (slice(first, first + size) for first in range(0, len(rows), size))


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=_exact(x), device=x.device)


def _fused(logits_CV: Tensor) -> bool:
    """Whether one kernel does it: where there are a GPU and Triton, unless the numbers are fp64."""
    kernel = logits_CV.is_cuda and importlib.util.find_spec("triton") is not None
    return kernel and logits_CV.dtype != torch.float64
