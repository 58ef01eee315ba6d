"""Whether a `transformers` model keeps documents of one sequence apart, found by trying.

Some models take positions that start again at 0 and look across them all the same (falcon, opt, jamba, granitemoehybrid):
their logits for one document then depend on the one before it, and nothing says so.
"""

import torch

from thinwire.errors import ConfigError
from thinwire.hub.native import Native

_DOCUMENT = 8
"""Tokens of each of the two documents."""
_TOLERANCE = 1e-5
"""Of the largest logit: what the order of sums may change."""


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


def refuse_crossing(model: Native, vocab_size: int, *, source: str, talks: bool) -> None:
    """Raise ConfigError if documents that are to be kept apart (`talks`: because they are conversations) see each other."""
    if crosses(model, vocab_size):
        wish = "conversations are" if talks else "data.cross_documents = false asks for documents to be"
        way_out = "train a model" if talks else "set data.cross_documents = true, or train a model"
        raise ConfigError(
            f"{source}: {wish} kept apart, and {type(model.module).__name__} lets a document see the one before it whatever "
            f"positions it is given; {way_out} that starts anew where positions do (llama, qwen, gemma, phi do)"
        )
