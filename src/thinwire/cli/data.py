"""`thinwire data`: token files from text, and a look at them."""

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from thinwire.data.chat import ChatOptions, prepare_chat
from thinwire.data.corpus import Corpus, DataConfig, read_manifest
from thinwire.data.notes import prepare_shown, tell
from thinwire.data.prepare import Options
from thinwire.errors import ConfigError

app = typer.Typer(help="Prepare token files from text, and look at them.", no_args_is_help=True, rich_markup_mode=None)


_OLD = typer.Option("--heldout-fraction", hidden=True)


def _checked(given: float | None, old: float | None) -> float:
    """The share for validation; `old` is that of the option's name in the last release."""
    if old is not None:
        note = "--heldout-fraction is --validation-fraction now"
        if given is not None:
            raise ConfigError(f"{note}, and both are given; leave --heldout-fraction out")
        warnings.warn(f"{note}; the old name works for one more release", FutureWarning, stacklevel=2)
    fraction = next(value for value in (given, old, Options.validation_fraction) if value is not None)
    if not 0 <= fraction < 1:
        raise ConfigError(f"--validation-fraction {fraction} must be at least 0 and below 1")
    return fraction


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, `stdlib`, or hf:DATASET.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, bpe:SIZE, or the path of a tokenizer.json.")] = "bytes",
    include: Annotated[list[str] | None, typer.Option(help="Glob of files to take from folders; may repeat.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of files to leave out; may repeat.")] = None,
    field: Annotated[str, typer.Option(help="Field of JSON rows, or column of tables, that holds the text.")] = "text",
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of documents kept for validation.", show_default="0.02")
    ] = None,
    heldout_fraction: Annotated[float | None, _OLD] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Special tokens spelled out in a text become special.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Tokenise text into Megatron's indexed format, with a validation split chosen by document hash.

    Example: thinwire data prepare stdlib -o corpora/stdlib --tokenizer bpe:4096
    """
    fraction = _checked(validation_fraction, heldout_fraction)
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1")
    globs = (tuple(include or ()), tuple(exclude or ()))
    options = Options(tuple(sources), tokenizer, *globs, field, fraction, special_tokens)
    manifest = prepare_shown(options, out, workers=workers, force=force)
    if as_json:
        typer.echo(json.dumps(manifest))
    else:
        _describe(out, manifest)


@app.command()
def chat(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="JSON files, folders of them, or hf:DATASET.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make.")],
    tokenizer: Annotated[Path, typer.Option(help="A folder with tokenizer.json and a chat template, as INIT/hub.")],
    field: Annotated[str, typer.Option(help="Field that holds the list of {role, content}.")] = "messages",
    last_answer_only: Annotated[
        bool, typer.Option("--last-answer-only", help="Learn only the last answer of each conversation.")
    ] = False,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of conversations kept for validation.", show_default="0.02")
    ] = None,
    heldout_fraction: Annotated[float | None, _OLD] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Special tokens spelled out in a message become special.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Render conversations with the tokenizer's chat template; training then scores the answers only.

    Example: thinwire data chat talks.jsonl -o corpora/talks --tokenizer inits/qwen/hub
    """
    fraction = _checked(validation_fraction, heldout_fraction)
    options = ChatOptions(tuple(sources), tokenizer, field, last_answer_only, fraction, special_tokens)
    manifest = prepare_chat(options, out, force=force)
    tell(manifest)
    _describe(out, manifest)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A folder made by `prepare`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """What a prepared folder holds.

    Example: thinwire data show corpora/stdlib
    """
    manifest = read_manifest(folder)
    Corpus.open(DataConfig(path=folder))
    if as_json:
        typer.echo(json.dumps(manifest))
    else:
        tell(manifest)
        _describe(folder, manifest)


def _describe(folder: Path, manifest: dict[str, Any]) -> None:
    vocabulary = manifest["tokenizer"]["vocab_size"]
    typer.echo(f"{folder}: {manifest['tokenizer']['file']} with {vocabulary:,} ids")
    for known in manifest.get("hub", []):
        version = known.get("revision") or known.get("fingerprint")
        typer.echo(f"  from {known['source']}, column {known['column']}, version {version}")
    for name, split in manifest["splits"].items():
        each = split["bytes"] / max(1, split["tokens"])
        typer.echo(
            f"  {name:8} {split['documents']:>10,} documents  {split['tokens']:>14,} tokens  {split['bytes']:>14,} bytes  "
            f"({each:.2f} bytes per token)"
            + (f"  {split['answer_tokens']:,} of them answers" if "answer_tokens" in split else "")
        )
