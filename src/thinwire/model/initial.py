"""First values of a transformer's parameters, each a function of seed and name alone: any rank can make any of them.

normal(0, init_std), the projections into the residual stream scaled by 1/sqrt(2 x layers) (GPT-2); biases 0, norms 1.
"""

import hashlib
import math

import torch
from torch import Tensor

from thinwire.model.spec import ModelSpec

_INTO_RESIDUAL = ("attention.out.weight", "ffn.down.weight")


def initial_weight(spec: ModelSpec, name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """The first value of parameter `name` of this shape, in fp32 on the CPU."""
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = spec.init_std / math.sqrt(2 * spec.layers) if name.endswith(_INTO_RESIDUAL) else spec.init_std
    drawn_from = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(drawn_from))
