"""A `transformers` causal language model behind the calls that the loop makes; the model itself is untouched.

Documents are kept apart by positions that start again at 0: transformers' masks see packed sequences by them. Some models
take such positions and look across them all the same (falcon, opt, jamba, granitemoehybrid): their logits for one document
then depend on the one before it, and nothing says so, so it is tried.
"""

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.model.loss import linear_loss, token_loss

_DOCUMENT = 8
"""Tokens of each of the two documents."""
_TOLERANCE = 1e-5
"""Of the largest logit: what the order of sums may change."""


class Native:
    """tokens (B, T) -> logits (B, T, V), or with targets (B, T) -> the sum of token losses, by a transformers model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        inner = getattr(module, "get_base_model", lambda: module)()
        self._positions = "position_ids" in inspect.signature(inner.forward).parameters
        self._head = plain_head(module)
        """The layer whose output the logits are; None if the model makes them in another way."""

    def __call__(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Raises ConfigError if documents are to be kept apart and the model takes no positions."""
        extra: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if positions_BT is not None:
            if not self._positions:
                raise ConfigError(
                    f"{type(self.module).__name__} takes no position_ids, so documents cannot be kept apart; set "
                    f"data.cross_documents = true, or train a model that takes them (conversations are always kept apart)"
                )
            extra["position_ids"] = positions_BT
        call = partial(self.module, input_ids=tokens_BT, use_cache=cache is not None, **extra)
        if targets_BT is None:
            return call().logits  # type: ignore[no-any-return]
        if self._head is None:
            return token_loss(call().logits, targets_BT)
        with _losing(self._head, targets_BT):
            return call().logits  # type: ignore[no-any-return]

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def train(self, mode: bool = True) -> "Native":
        self.module.train(mode)
        return self

    def eval(self) -> "Native":
        return self.train(False)

    def new_cache(self) -> Any:
        return transformers_library().DynamicCache()


def plain_head(module: nn.Module) -> nn.Linear | None:
    """The linear layer whose output is what the model returns as logits, found by running two tokens.

    None if there is none, or if something is done to its output (scaled or capped logits, say).
    """
    inner = getattr(module, "get_base_model", lambda: module)()
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or head.weight.is_meta or "forward" in vars(head):
        return None
    tokens_12 = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda head, args, out: made.append(out))
    training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(input_ids=tokens_12, use_cache=False).logits
    finally:
        hook.remove()
        module.train(training)
    return head if len(made) == 1 and logits is made[0] and logits.shape[:2] == tokens_12.shape else None


@contextlib.contextmanager
def _losing(head: nn.Linear, targets_BT: Tensor) -> Iterator[None]:
    """Inside, the head gives the loss where it gave logits: in its own forward, where its weights are at hand."""
    head.forward = lambda x_BTD: linear_loss(x_BTD, head.weight, targets_BT, head.bias)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def crosses(model: Native, vocab_size: int, *, seed: int = 0) -> bool:
    """Whether the second document's logits change with the first one's tokens. The model's own state is left as it was.

    Raises ConfigError if the model takes no positions.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_2T = torch.randint(0, vocab_size, (1, 2 * _DOCUMENT), generator=generator).repeat(2, 1)
    tokens_2T[1, :_DOCUMENT] = (tokens_2T[1, :_DOCUMENT] + 1) % vocab_size
    positions_1T = torch.arange(_DOCUMENT).repeat(2)[None].to(model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, other = (
                model(tokens_1T[None].to(model.device), positions_BT=positions_1T)[0, _DOCUMENT:].float()
                for tokens_1T in tokens_2T
            )
    finally:
        model.train(training)
    return bool((one - other).abs().max() > _TOLERANCE * one.abs().max())


def refuse_if_crossing(model: Native, vocab_size: int, *, source: str, talks: bool) -> None:
    """Raise ConfigError if documents that are to be kept apart (`talks`: because they are conversations) see each other."""
    if crosses(model, vocab_size):
        wish = "conversations are" if talks else "data.cross_documents = false asks for documents to be"
        way_out = "train a model" if talks else "set data.cross_documents = true, or train a model"
        raise ConfigError(
            f"{source}: {wish} kept apart, and {type(model.module).__name__} lets a document see the one before it whatever "
            f"positions it is given; {way_out} that starts anew where positions do (llama, qwen, gemma, phi do)"
        )


def transformers_library() -> ModuleType:
    """Raises ConfigError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "model.hf needs the transformers library, which is not installed; pip install 'thinwire[hf]'"
        ) from None
    return transformers
