"""Cross entropy summed over valid tokens, in chunks, so that logits are never all upcast at once.

B batch, T tokens, V vocabulary, N = B x T, C tokens of a chunk
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
_CHUNK_LOGITS = 2**24


def token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum (not mean) of -log p(target) over targets other than -100; a scalar in at least fp32."""
    vocabulary = logits_BTV.shape[-1]
    logits_NV, targets_N = logits_BTV.reshape(-1, vocabulary), targets_BT.reshape(-1)
    exact = torch.float64 if logits_BTV.dtype == torch.float64 else torch.float32
    if logits_NV.dtype == exact:
        return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    chunk = max(1, _CHUNK_LOGITS // vocabulary)
    total = torch.zeros((), dtype=exact, device=logits_NV.device)
    for first in range(0, targets_N.numel(), chunk):
        logits_CV, targets_C = logits_NV[first : first + chunk].to(exact), targets_N[first : first + chunk]
        total = total + F.cross_entropy(logits_CV, targets_C, ignore_index=IGNORED, reduction="sum")
    return total
