"""What a person should hear about a corpus that was made: nothing is changed, lost or left out silently.

Preparation with a progress bar.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from thinwire.data.prepare import Options, prepare
from thinwire.errors import StopAsked

FEW_TOKENS = 1000
"""Scored tokens of a validation below which its loss is too noisy: its standard error is some 0.1 nats."""
_TOLD_SHARE = 1e-3


def notes(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences about the corpus that `manifest` describes; none if all is as one expects."""
    counts = {key: 0 for split in manifest["splits"].values() for key, value in split.items() if isinstance(value, int)}
    for split in manifest["splits"].values():
        for key in counts:
            counts[key] += split.get(key, 0)
    of_rows = [_mended(manifest), _spelling(manifest, counts), _left_out(manifest), _unread(manifest)]
    return [sentence for sentence in [*of_rows, _lost(counts), _changed(counts), _validation(manifest)] if sentence]


def _mended(manifest: Mapping[str, Any]) -> str | None:
    if (mended := manifest.get("mended")) is None:
        return None
    return (
        f"{mended['documents']:,} documents hold halves of surrogate pairs, which are no characters (first: "
        f"{mended['first']}); each half became U+FFFD"
    )


def _spelling(manifest: Mapping[str, Any], counts: Mapping[str, int]) -> str | None:
    if not (spelling := counts.get("spelling_special_tokens", 0)):
        return None
    if manifest["special_tokens"]:
        return f"{spelling:,} documents spell out special tokens, which became special tokens, as asked for"
    return (
        f"{spelling:,} documents spell out special tokens, such as the end of text; they are ordinary text there; "
        f"special_tokens = true (--special-tokens) makes them special"
    )


def _left_out(manifest: Mapping[str, Any]) -> str | None:
    if not (count := manifest.get("nothing_to_learn", 0)):
        return None
    return f"{count:,} conversations have no answer to learn, every weight being 0, and are left out"


def _unread(manifest: Mapping[str, Any]) -> str | None:
    if not (count := manifest.get("inputs_unread", 0)):
        return None
    return f"{count:,} conversations have tools or documents, which the chat template does not read; they are left out"


def _lost(counts: Mapping[str, int]) -> str | None:
    if not (unknown := counts.get("unknown_tokens", 0)):
        return None
    return f"{unknown:,} tokens are unknown to the tokenizer's vocabulary, and what they stood for is lost"


def _changed(counts: Mapping[str, int]) -> str | None:
    text, stood = counts["bytes"], counts.get("bytes_of_tokens", counts["bytes"])
    if abs(text - stood) <= _TOLD_SHARE * text:
        return None
    return (
        f"the tokens stand for {stood:,} of {text:,} bytes: the tokenizer does not keep every text as it is, and bits per "
        f"byte count the bytes that tokens stand for"
    )


def _validation(manifest: Mapping[str, Any]) -> str | None:
    split = manifest["splits"]["heldout"]
    scored = split.get("answer_tokens", split["tokens"])
    if manifest["heldout_fraction"] == 0 or scored >= FEW_TOKENS:
        return None
    every = sum(one["documents"] for one in manifest["splits"].values())
    if split["documents"] == 0:
        return (
            f"none of the {every:,} documents was held out (validation_fraction = {manifest['heldout_fraction']}), so there "
            f"is no validation; raise it"
        )
    return (
        f"validation has {split['documents']:,} of the {every:,} documents with {scored:,} scored tokens, too few to "
        f"compare losses by; raise validation_fraction = {manifest['heldout_fraction']}"
    )


def prepare_shown(
    options: Options,
    out: Path,
    *,
    workers: int | None = None,
    force: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """`prepare` with a bar on standard error. Raises DataError as `prepare` does, and StopAsked soon after `stopped()`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def shown(phase: str, done: int, total: int | None) -> None:
            if stopped():
                raise StopAsked(f"stopped before {out} was made; the same command starts again")
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        manifest = prepare(options, out, workers=workers, force=force, progress=shown)
    tell(manifest)
    return manifest


def tell(manifest: Mapping[str, Any]) -> None:
    """What a person should hear of the corpus that was made, on standard error."""
    for note in notes(manifest):
        Console(stderr=True).print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
