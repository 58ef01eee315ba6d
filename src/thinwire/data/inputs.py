"""What sources mean, opened: one input for each file, and one for each data set of the hub."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from thinwire.data import hub, sources

Item = TypeVar("Item")


@dataclass(frozen=True)
class Input(Generic[Item]):
    """Something to read, again and again in the same order."""

    read: Callable[..., Iterator[Item]]
    """From the beginning; or given what `place` once returned, after that."""
    size_bytes: int | None
    """None: not known before it is read."""
    identity: dict[str, str | None] | None = None
    """Which data set of the hub it is; None for a file."""
    place: Callable[[], hub.Place] | None = None
    """How far the reading has come; None where it cannot be taken up again."""


def texts_of(
    names: Sequence[str], *, field: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Input[tuple[str, str]]]:
    """(document, where it stands) of every source. Raises DataError as `files_of`, `open_hub` and `HubRows.column` do."""
    of_file = partial(sources.documents, field=field)
    return _opened(names, field, hub.HubRows.texts, of_file, include=include, exclude=exclude)


def check_files(names: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
    """Raise DataError, as `files_of` does, for a source that is no data set of the hub and not there; nothing is read."""
    for name in names:
        if not name.startswith(hub.PREFIX):
            sources.files_of(name, include=include, exclude=exclude)


def rows_of(names: Sequence[str], *, field: str, also: Collection[str] = ()) -> list[Input[tuple[Any, str]]]:
    """(row, where it stands) of every source; of data sets the columns `field` and, where there are such, `also`.

    Raises DataError as `texts_of`.
    """

    def of_set(rows: hub.HubRows, column: str) -> Iterator[tuple[Any, str]]:
        return rows.rows([column, *(name for name in rows.names() if name in also and name != column)])

    return _opened(names, field, of_set, sources.rows)


def _opened(
    names: Sequence[str],
    field: str,
    of_set: Callable[..., Iterator[Item]],
    of_file: Callable[[Path], Iterator[Item]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Input[Item]]:
    """Read by `of_set(rows, column)` or `of_file(path)`."""
    found: list[Input[Item]] = []
    for name in names:
        if name.startswith(hub.PREFIX):
            rows = hub.open_hub(name)
            column = rows.column(field)
            found.append(Input(partial(of_set, rows, column), None, {**rows.identity, "column": column}, rows.place))
        else:
            files = sources.files_of(name, include=include, exclude=exclude)
            found += [Input(partial(of_file, file), file.stat().st_size) for file in files]
    return found


def identities(inputs: Sequence[Input[Any]]) -> dict[str, list[dict[str, str | None]]]:
    """`hub` of a manifest: which data sets were read; empty if none were."""
    known = [one.identity for one in inputs if one.identity is not None]
    return {"hub": known} if known else {}
