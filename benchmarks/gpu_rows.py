"""Rows of the GPU check: as a table on the terminal, and as a page of the docs."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

COLUMNS = ("part", "what", "measured", "aim", "met")


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    part: str
    what: str
    measured: str
    aim: str
    met: bool
    speed: bool = False
    """Whether it is about speed or memory of the device: not judged in a dry run."""

    def cells(self, *, dry: bool) -> tuple[str, ...]:
        met = "not judged" if dry and self.speed else "yes" if self.met else "NO"
        return self.part, self.what, self.measured, self.aim, met


def show(rows: Sequence[Row], *, dry: bool) -> None:
    """Print the table."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells(dry=dry))
    Console(width=150).print(table)


def page(rows: Sequence[Row], *, dry: bool, seconds: float) -> str:
    """The page, in Markdown."""
    device = "CPU (a dry run)" if dry else torch.cuda.get_device_name()
    lines = [
        "# On a GPU",
        "",
        f"`benchmarks/gpu_check.sh` on: {device}; torch {torch.__version__}, Python {platform.python_version()}; "
        f"{seconds:.0f} s in all. Steps are of a 1.0 B Llama at 8 x 4,096 tokens, bf16, micro-batches of 4, medians.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in row.cells(dry=dry))
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"
