"""`thinwire generate RUN`: text from a run's model, as it is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.data.chat import Prompt, chat_prompt, opening, text_prompt
from thinwire.data.tokenizer import Tokenizer
from thinwire.errors import ConfigError, DataError
from thinwire.hub.init import HUB

if TYPE_CHECKING:
    from thinwire.evaluate.load import LoadedRun


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; default: how its data begins.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message; print the answer.")] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Most new tokens; default: 200, or what fits.", min=1, max=10**9)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text.", min=0, max=2**62)] = 0,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
) -> None:
    """Continue a prompt, or answer a message; the text appears as it is drawn.

    Example: thinwire generate runs/stdlib --prompt "class Stack:" --temperature 0.7
    """
    from thinwire.evaluate.load import device_for, load_run
    from thinwire.train.shortage import shortage_explained

    if chat and not prompt:
        raise ConfigError("--chat answers a message; give one with --prompt")
    if prompt is not None and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError("--prompt is no UTF-8 text; give one that is")
    where = device_for(device)
    hint = "give --device cpu where the host has more memory" if where.type != "cpu" else ""
    with shortage_explained(where, hint=hint):
        loaded = load_run(folder, step=step, device=where)
        tokenizer, start = _start(loaded, folder, prompt, chat=chat)
        shown = prompt if prompt is not None else tokenizer.decode(start.ids)
        _continue(loaded, tokenizer, start, "" if chat else shown, tokens, temperature, top_p, seed)


def _start(loaded: "LoadedRun", folder: Path, text: str | None, *, chat: bool) -> tuple[Tokenizer, Prompt]:
    corpus = loaded.corpus()
    if corpus.tokenizer is None:
        raise DataError(f"the corpus {loaded.data.path} has no tokenizer, so there is no text to continue")
    if text is None:
        return corpus.tokenizer, opening(corpus).fitting(loaded.spec.max_tokens // 2)
    if chat:
        return corpus.tokenizer, chat_prompt(corpus.tokenizer, [loaded.data.path, folder / HUB], text)
    return corpus.tokenizer, text_prompt(corpus.tokenizer, text)


def _continue(
    loaded: "LoadedRun",
    tokenizer: Tokenizer,
    prompt: Prompt,
    shown: str,
    tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    from thinwire.model.generate import generate, stream_text

    drawn = generate(
        loaded.model,
        prompt.ids,
        max_new_tokens=tokens or max(1, min(200, loaded.spec.max_tokens - len(prompt.ids))),
        max_tokens=loaded.spec.max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=prompt.stop_ids,
    )
    stream = stream_text(drawn, tokenizer.decode)
    first = next(stream, "")
    typer.echo(shown + first, nl=False)
    for text in stream:
        typer.echo(text, nl=False)
    typer.echo()
