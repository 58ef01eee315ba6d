"""Preparation with a progress bar."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from thinwire.data.notes import notes
from thinwire.data.prepare import Options, prepare
from thinwire.errors import StopAsked


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
