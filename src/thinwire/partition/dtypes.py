"""Names of precisions in plans, as torch's."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def computed_in(dtype: torch.dtype, chosen: str) -> torch.dtype:
    """fp32 weights are computed with in the plan's precision; others keep the one they were given in."""
    return COMPUTE_DTYPES[chosen] if dtype == torch.float32 else dtype


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Masters, gradient sums and optimizer states: fp64 for fp64 weights, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_of_squares(x: Tensor) -> float:
    """Of all elements, accumulated in fp64, without a copy of `x` in fp64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def norm_of(squares: float, dtypes: Collection[torch.dtype]) -> float:
    """The 2-norm, rounded to fp32 unless gradients are finer, so that the order of summing does not show; NaN stays."""
    norm = math.sqrt(squares) if squares >= 0 else math.nan
    return norm if torch.float64 in dtypes else float(torch.tensor(norm, dtype=torch.float32))
