"""`thinwire export RUN -o DIR`: a run's model as a Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer

from thinwire.hub.files import precision_of, shard_bytes
from thinwire.units import show_count


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder to make.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    family: Annotated[
        str | None,
        typer.Option(help="llama, mistral, qwen2, qwen3 or gpt2; default: where it came from, or what fits."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights; also what is held in memory.")] = "5 GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Write config, safetensors, tokenizer and generation config as `transformers.AutoModelForCausalLM` loads them.

    Example: thinwire export runs/stdlib -o stdlib-hf --precision bf16
    """
    chosen, limit = precision_of(precision), shard_bytes(shard_size)
    from thinwire.hub.export_run import export_run

    done = export_run(folder, out, step=step, precision=chosen, model_type=family, force=force, shard_bytes=limit)
    typer.echo(
        f"{out}: step {done.step} of {folder} as {done.model_type}, {show_count(done.parameters)} parameters in "
        f"{precision}" + ("" if done.tokenizer else "; without a tokenizer, since the corpus has none")
    )
