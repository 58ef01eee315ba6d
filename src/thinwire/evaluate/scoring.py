"""Loss on the validation split: every rank scores its share, sums are added over ranks. Perplexity and bits per byte follow.

Bits per byte (used since arXiv 1308.0850 for text) is independent of the tokenizer: nats / ln 2 / UTF-8 bytes scored.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from thinwire.data.loader import Batch
from thinwire.data.tokenizer import TokenBytes
from thinwire.model.generate import LanguageModel

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
    token_bytes: TokenBytes | None,
    cross_documents: bool,
) -> Score:
    """The sums over `batches`, on this rank alone; the model computes where it is."""
    training, device = model.training, model.device
    model.eval()
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            extra = {} if cross_documents else _boundaries(batch, device)
            tokens_BT, targets_BT = (torch.from_numpy(x).to(device) for x in (batch.tokens_BT, batch.targets_BT))
            loss_sum += float(model(tokens_BT, targets_BT, **extra))
            tokens += int((batch.targets_BT >= 0).sum())
            text_bytes += 0 if token_bytes is None else _bytes_scored(batch, token_bytes)
    model.train(training)
    return Score(loss_sum, tokens, text_bytes)


def _bytes_scored(batch: Batch, token_bytes: TokenBytes) -> int:
    """Of the targets that count. What a token stands for may depend on those before it, scored or not."""
    following_B1 = np.maximum(batch.targets_BT[:, -1:], 0)
    bytes_BT = token_bytes[np.concatenate([batch.tokens_BT, following_B1], axis=1)][:, 1:]
    return int(bytes_BT[batch.targets_BT >= 0].sum())


def _boundaries(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "positions_BT": torch.from_numpy(batch.positions_BT).to(device),
        "documents_BT": torch.from_numpy(batch.documents_BT),
    }
