"""Where documents come from: text files, folders, JSON lines, parquet, and the running interpreter's own library.

Every source yields its documents in one fixed order.
"""

import fnmatch
import gzip
import io
import json
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from thinwire.errors import DataError

STDLIB = "stdlib"
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def files_of(source: str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Path]:
    """The files that `source` means, sorted. A folder gives every file in it whose relative path passes the globs.

    Raises DataError if there is no such source or nothing passes.
    """
    if source == STDLIB:
        return _stdlib_files()
    root = Path(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{source} does not exist; give a file, a folder, {STDLIB!r} or hf:DATASET")
    found = [path for path in _walk(root) if _passes(path.relative_to(root).as_posix(), include, exclude)]
    if not found:
        globs = f" that match {', '.join(include)}" if include else ""
        raise DataError(f"the folder {source} holds no files{globs}; change --include or --exclude")
    return found


def _walk(root: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """The files below `root` in one fixed order; hidden folders and files, and folders named in `without`, left out."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in without and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _passes(relative: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    names = (relative, relative.rpartition("/")[2])
    wanted = not include or any(fnmatch.fnmatch(name, glob) for glob in include for name in names)
    return wanted and not any(fnmatch.fnmatch(name, glob) for glob in exclude for name in names)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in _walk(root, _NOT_LIBRARY) if path.suffix == ".py"]
    if not found:
        raise DataError(f"this Python keeps no library source in {root}; give a folder of text instead")
    return found


def documents(path: Path, *, field: str = "text") -> Iterator[str]:
    """The documents of one file: rows of .jsonl(.gz|.zst) and .parquet, else the whole file as text.

    Raises DataError, with the line, for a row without `field`, a damaged file, or one that is not UTF-8 text.
    """
    name = path.name
    try:
        if name.endswith(_JSON_ENDINGS):
            yield from _json_rows(path, field)
        elif name.endswith(".parquet"):
            yield from _parquet_rows(path, field)
        else:
            yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); leave it out with --exclude") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def rows(path: Path) -> Iterator[tuple[Any, str]]:
    """(row, where it stands) of a .jsonl(.gz|.zst) file. Raises DataError for another kind, a damaged line or file."""
    if not path.name.endswith(_JSON_ENDINGS):
        raise DataError(f"{path} is not of the kind {', '.join(_JSON_ENDINGS)}; conversations are read from those")
    try:
        yield from _json_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_rows(path: Path, field: str) -> Iterator[str]:
    for row, where in _json_lines(path):
        yield text_of(row, field, where)


def _json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line), f"{path} line {number}"
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not JSON: {error.msg}") from None


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row. Raises DataError, with where the row stands, if it has none."""
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no field {field!r} (it has: {keys}); name the field with --field")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: the field {field!r} is {type(row[field]).__name__}, not text")
    return str(row[field])


def _open_text(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    if path.name.endswith(".zst"):
        import zstandard

        raw = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
        return io.TextIOWrapper(raw, encoding="utf-8")
    return path.open(encoding="utf-8")


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column {column!r} (it has: {there}); name the column with --field")
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield text_of({column: value}, column, str(path))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from None
