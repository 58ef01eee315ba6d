"""`thinwire import DIR -o INIT`: a Hugging Face folder as weights that a run starts from."""

from pathlib import Path
from typing import Annotated

import typer

from thinwire.hub.files import shard_bytes
from thinwire.units import show_count


def run(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder with safetensors weights.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="INIT", help="The folder to make.")],
    max_tokens: Annotated[int | None, typer.Option(help="Context length; default: the model's.", min=1)] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="A config key to leave out of account; may repeat.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights; also what is held in memory.")] = "5 GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Check a Llama, Mistral, Qwen2, Qwen3 or GPT-2 folder and copy it, shard by shard; then `[model] init = "INIT"`.

    Example: thinwire import downloads/Qwen2.5-0.5B -o inits/qwen
    """
    limit = shard_bytes(shard_size)
    from thinwire.hub.import_folder import import_folder

    init = import_folder(
        source, out, force=force, ignored=tuple(ignore or ()), max_tokens=max_tokens, shard_bytes=limit
    )
    typer.echo(
        f"{out}: a {init.model_type} model of {show_count(init.spec.parameters)} parameters; start a run from it with\n"
        f'  [model]\n  init = "{out}"'
    )
    for note in init.notes:
        typer.echo(f"note: {note}")
    if (out / "hub" / "tokenizer.json").is_file():
        typer.echo(
            f"and prepare text for it with\n  thinwire data prepare TEXT -o CORPUS --tokenizer {out}/hub/tokenizer.json"
        )
