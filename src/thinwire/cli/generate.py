"""`thinwire generate RUN`: text from a run's model, as it is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from thinwire.evaluate.load import LoadedRun


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1, max=10**9)] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text.", min=0, max=2**62)] = 0,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
) -> None:
    """Continue a prompt; the text appears as it is drawn.

    Example: thinwire generate runs/stdlib --prompt "class Stack:" --temperature 0.7
    """
    from thinwire.evaluate.load import device_for, load_run
    from thinwire.train.shortage import shortage_explained

    where = device_for(device)
    hint = "give --device cpu where the host has more memory" if where.type != "cpu" else ""
    with shortage_explained(where, hint=hint):
        _continue(load_run(folder, step=step, device=where), prompt, tokens, temperature, top_p, seed)


def _continue(loaded: "LoadedRun", prompt: str, tokens: int, temperature: float, top_p: float, seed: int) -> None:
    from thinwire.errors import DataError
    from thinwire.model.generate import generate, stream_text

    tokenizer = loaded.corpus().tokenizer
    if tokenizer is None:
        raise DataError(f"the corpus {loaded.data.path} has no tokenizer, so there is no text to continue")
    ids = tokenizer.encode(prompt)
    drawn = generate(
        loaded.model,
        ids,
        max_new_tokens=tokens,
        max_tokens=loaded.spec.max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=(tokenizer.eot,),
    )
    stream = stream_text(drawn, tokenizer.decode)
    first = next(stream, "")
    typer.echo(prompt + first, nl=False)
    for text in stream:
        typer.echo(text, nl=False)
    typer.echo()
