"""What the loop, validation and generation ask of a language model, whoever built it."""

from typing import Any, Protocol

import torch
from torch import Tensor

# B batch, T tokens, V vocabulary


class LanguageModel(Protocol):
    """tokens (B, T) -> logits (B, T, V); with targets (B, T) -> the sum of token losses, negative targets left out."""

    @property
    def training(self) -> bool: ...

    @property
    def device(self) -> torch.device:
        """Where it computes: tokens have to be there too."""
        ...

    def __call__(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def new_cache(self) -> Any:
        """An empty store of the keys and values of tokens seen, for `cache`."""
        ...
