"""The cells of a sweep: what became of a case under a plan on a world, and the file of them."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

NO_REFERENCE = "no reference"


@dataclass(frozen=True)
class Cell:
    """`verdict` is equal, refused, wrong, or `NO_REFERENCE` with the plan `-`; `detail` says why it is not equal."""

    case: str
    world: str
    plan: str
    verdict: str
    detail: str
    seconds: float


def read(file: Path) -> list[Cell]:
    """Those of an earlier sweep; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return [Cell(**{**row, "seconds": float(row["seconds"])}) for row in csv.DictReader(lines)]


def write(file: Path, cells: Sequence[Cell]) -> None:
    with file.open("w", encoding="utf-8", newline="") as lines:
        rows = csv.DictWriter(lines, [field.name for field in fields(Cell)])
        rows.writeheader()
        rows.writerows(asdict(cell) for cell in cells)
