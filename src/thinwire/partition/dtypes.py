"""Names of precisions in plans, as torch's."""

from collections.abc import Mapping

import torch

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Masters, gradient sums and optimizer states: fp64 for fp64 weights, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
