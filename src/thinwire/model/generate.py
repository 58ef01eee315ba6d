"""Sampling one token at a time with a key/value cache; top-p ("nucleus") sampling is arXiv 1904.09751.

`LanguageModel` is what the loop, validation and generation ask of a model, whoever built it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.errors import ConfigError, DivergenceError

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


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that follow `prompt`, as they are drawn; stops before an id of `stop_ids`.

    `max_tokens` is the model's length, temperature 0 means the likeliest token. The model computes where it is; tokens are
    drawn on the CPU, so that equal logits give equal text on every device. Raises ConfigError for an empty prompt
    or one that leaves no room, a negative temperature, or a top_p outside (0, 1].
    """
    _check(prompt, max_new_tokens, max_tokens, temperature, top_p)
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache()
    step = torch.tensor([list(prompt)], device=model.device)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_V = model(step, cache=cache)[0, -1].float().cpu()
        chosen = pick(logits_V, temperature=temperature, top_p=top_p, generator=generator)
        if chosen in stop_ids:
            return
        yield chosen
        step = torch.tensor([[chosen]], device=model.device)


def pick(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id drawn from softmax(logits / temperature), from the fewest likeliest ids that hold `top_p` of the mass."""
    if not torch.isfinite(logits_V).all():
        raise DivergenceError("the model's logits are not finite, its weights have diverged; give an earlier --step")
    if temperature == 0:
        return int(logits_V.argmax())
    behind_V = (logits_V - logits_V.max()).double()  # at most 0, so that no temperature makes them too large
    probabilities_V = torch.softmax(behind_V / temperature, dim=-1).float()
    if top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        beyond_V = sorted_V.cumsum(0) - sorted_V >= top_p
        beyond_V[0] = False  # the likeliest stays, however little is asked for
        probabilities_V[order_V[beyond_V]] = 0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def stream_text(ids: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text as it comes: held back while its last character is incomplete."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = decode(seen)[len(shown) :]
    if rest:
        yield rest


def _check(prompt: Sequence[int], new: int, longest: int, temperature: float, top_p: float) -> None:
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one token of text")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ConfigError(f"temperature = {temperature} must be at least 0 and finite, and top_p = {top_p} in (0, 1]")
    if len(prompt) + new > longest:
        way_out = (
            f"ask for at most {longest - len(prompt)} new tokens"
            if len(prompt) < longest
            else f"shorten the prompt to at most {longest - 1} tokens"
        )
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens and {new} new ones do not fit the model's {longest} positions; {way_out}"
        )
