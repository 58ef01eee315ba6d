"""Loss on held-out text: every rank scores its share, sums are added over ranks. Perplexity and bits per byte follow.

Bits per byte (used since arXiv 1308.0850 for text) is independent of the tokenizer: nats / ln 2 / UTF-8 bytes scored.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from thinwire.data.loader import Batch
from thinwire.model.language import LanguageModel

# B batch, T tokens


@dataclass(frozen=True)
class Score:
    """Sums over the tokens scored; the figures are their ratios. `text_bytes` is 0 if the tokenizer is unknown."""

    loss_sum: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.loss_sum / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss_sum / math.log(2) / self.text_bytes if self.text_bytes else None


def score(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    token_bytes: NDArray[np.int64] | None,
    cross_documents: bool,
) -> Score:
    """The sums over `batches`, on this rank alone; the model computes where it is.

    `token_bytes[id]` is how many UTF-8 bytes token `id` stands for.
    """
    training, device = model.training, model.device
    model.eval()
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            extra = {} if cross_documents else _boundaries(batch, device)
            tokens_BT, targets_BT = (torch.from_numpy(x).to(device) for x in (batch.tokens_BT, batch.targets_BT))
            loss_sum += float(model(tokens_BT, targets_BT, **extra))
            counted = batch.targets_BT[batch.targets_BT >= 0]
            tokens += counted.size
            text_bytes += 0 if token_bytes is None else int(token_bytes[counted].sum())
    model.train(training)
    return Score(loss_sum, tokens, text_bytes)


def _boundaries(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "positions_BT": torch.from_numpy(batch.positions_BT).to(device),
        "documents_BT": torch.from_numpy(batch.documents_BT),
    }
