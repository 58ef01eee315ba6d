"""`thinwire eval RUN`: how well a run's model predicts the validation split."""

import json
from pathlib import Path
from typing import Annotated

import typer

from thinwire.data.loader import evaluation_batches
from thinwire.errors import DataError


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[Path | None, typer.Option(help="A prepared corpus; default: the run's own.")] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to score; 0: all.", min=0, max=10**9)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences in one forward.", min=1, max=10**6)] = 8,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Loss, perplexity and bits per byte on the validation split of a corpus.

    Example: thinwire eval runs/stdlib --data corpora/stdlib
    """
    from thinwire.evaluate.load import device_for, load_run
    from thinwire.evaluate.scoring import score
    from thinwire.train.shortage import shortage_explained

    where = device_for(device)
    smaller = ["give a smaller --batch"] if batch > 1 else []
    elsewhere = ["give --device cpu where the host has more memory"] if where.type != "cpu" else []
    hint = ", or ".join([*smaller, *elsewhere])
    with shortage_explained(where, hint=hint):
        loaded = load_run(folder, step=step, device=where)
    corpus = loaded.corpus(data)
    if corpus.validation is None or corpus.validation.tokens < 2:
        raise DataError(
            f"{data or loaded.data.path} has no validation split; prepare it with a --validation-fraction above 0"
        )
    batches = evaluation_batches(
        corpus.validation,
        loaded.tokens,
        batch,
        limit=sequences or None,
        cross_documents=corpus.cross_documents,
        vocab_size=loaded.spec.vocab_size,
    )
    with shortage_explained(where, hint=hint):
        result = score(loaded.model, batches, token_bytes=corpus.token_bytes, cross_documents=corpus.cross_documents)
    if result.tokens == 0:
        raise DataError(
            f"no token of the {sequences or 'validation'} sequences of {data or loaded.data.path} is scored; score more "
            f"with --sequences, or prepare it with a larger --validation-fraction"
        )
    figures = {
        "step": loaded.step,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
    }
    if as_json:
        typer.echo(json.dumps(figures))
        return
    bits = "unknown (no tokenizer)" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    typer.echo(
        f"step {loaded.step}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, bits per byte {bits} "
        f"({result.tokens:,} tokens)"
    )
