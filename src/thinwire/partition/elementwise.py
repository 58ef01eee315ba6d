"""Whether an optimizer's update of an element depends on that element alone: found by trying it.

A rank owns flat intervals of parameters. AdamW, SGD or Lion compute on them what they would on whole tensors; Adafactor,
LAMB or Muon, which look at rows, columns or norms, would compute something else without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.errors import PlanError

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
_TRIAL_STEPS = 3


def check_elementwise(build: Build, options: dict[str, Any], like: Tensor) -> None:
    """Raises PlanError unless `build` makes an optimizer that treats a matrix as it does two flat parts of it.

    `options` are those of the parameter groups; `like` is a tensor of the precision and device of the masters.
    """
    make: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        start, *grads = (torch.randn(4, 4, generator=generator).to(**make) for _ in range(1 + _TRIAL_STEPS))
        whole = _trained(build, options, [start], [[grad] for grad in grads])
        parts = _trained(build, options, _parts(start), [_parts(grad) for grad in grads])
    if whole is None or parts is None or not torch.allclose(whole, parts, rtol=1e-5, atol=1e-7):
        raise PlanError(
            "this optimizer's update of an element depends on others (its row, its column, a norm), and every rank owns "
            "flat parts of parameters; take one that is elementwise, such as AdamW, SGD or Lion"
        )


def _parts(matrix: Tensor) -> list[Tensor]:
    return list(torch.split(matrix.flatten(), [5, 11]))


def _trained(
    build: Build, options: dict[str, Any], start: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> Tensor | None:
    """What steps make of `start`, flat; None if the optimizer does not take such tensors."""
    params = [part.clone() for part in start]
    try:
        optimizer = build([{"params": params, **options}])
    except ValueError:
        return None
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return torch.cat([param.flatten() for param in params])
