"""Where documents come from: text files, folders, JSON, parquet, and the running interpreter's own library.

Every source yields its documents in one fixed order. What a file holds is told by its ending, in letters of either case
and before that of its compression (.gz, .zst). A file that ends too early is an error: half a corpus that passes for a
complete one is worse than none.
"""

import fnmatch
import gzip
import io
import itertools
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from thinwire.errors import DataError

STDLIB = "stdlib"
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_JSON = (".jsonl", ".ndjson", ".json")
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z")


def files_of(source: str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Path]:
    """The files that `source` means, sorted. A folder gives every file in it whose relative path passes the globs.

    Links are followed. Raises DataError if there is no such source, nothing passes, or what passes is nothing that
    documents can be read from: a pipe, an archive, a link that leads nowhere or back to where it is.
    """
    if source == STDLIB:
        return _stdlib_files()
    root = Path(source)
    if not os.path.lexists(root):
        raise DataError(f"{source} does not exist; give a file, a folder, {STDLIB!r} or hf:DATASET")
    hint = f"give a file, a folder, {STDLIB!r} or hf:DATASET"
    if not stat.S_ISDIR(_mode(root, hint)):
        return [_readable(root, hint)]
    hint = "leave it out with --exclude"

    def enter(folder: Path) -> bool:
        """Not where every file is left out, nor a link that is left out by its name."""
        relative = folder.relative_to(root).as_posix()
        return not (_any(f"{relative}/", exclude) or (folder.is_symlink() and _any(relative, exclude)))

    below = _walk(root, enter)
    found = [_readable(path, hint) for path in below if _passes(path.relative_to(root).as_posix(), include, exclude)]
    if not found:
        globs = f" that match {', '.join(include)}" if include else ""
        raise DataError(f"the folder {source} holds no files{globs}; change --include or --exclude")
    return found


def _mode(path: Path, hint: str) -> int:
    """What is at `path`, links followed. Raises DataError if nothing is, or it may not be looked at."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{path} is a link to what does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; {hint}") from None


def _readable(path: Path, hint: str) -> Path:
    """`path`, if it is a file that documents can be read from. Raises DataError."""
    if not stat.S_ISREG(_mode(path, hint)):
        raise DataError(f"{path} is a pipe, a socket or a device, which cannot be read twice; {hint}")
    if ending(path) in _ARCHIVES:
        raise DataError(f"{path} is an archive of files; unpack it, and {hint}")
    return path


def _walk(folder: Path, enter: Callable[[Path], bool], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """What is below `folder` in one fixed order: files, then those of each folder to `enter`; hidden ones are left out.

    Raises DataError for a folder that cannot be listed, or leads back to one `above` it.
    """
    here = folder.resolve()
    if here in above:
        raise DataError(f"{folder} is a link back to {here}, which it is in; leave it out with --exclude")
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; leave it out with --exclude") from None
    yield from (path for path in paths if not _is_folder(path))
    for path in paths:
        if _is_folder(path) and enter(path):
            yield from _walk(path, enter, (*above, here))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # told where it is read, unless it is left out
        return False


def _passes(relative: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or _any(relative, include)) and not _any(relative, exclude)


def _any(relative: str, globs: Sequence[str]) -> bool:
    """Whether a path, or its last part, matches one of `globs`."""
    return any(fnmatch.fnmatch(name, glob) for glob in globs for name in (relative, relative.rpartition("/")[2]))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    below = _walk(root, lambda folder: folder.name not in _NOT_LIBRARY and not folder.is_symlink())
    found = [path for path in below if path.suffix == ".py"]
    if not found:
        raise DataError(f"this Python keeps no library source in {root}; give a folder of text instead")
    return found


def documents(path: Path, *, field: str = "text") -> Iterator[tuple[str, str]]:
    """(document, where it stands) of one file: rows of JSON and parquet, else the whole file as text.

    Raises DataError, with the line, for a row without `field`, a damaged file, or one that is not UTF-8 text.
    """
    if ending(path) in _JSON:
        yield from ((text_of(row, field, where), where) for row, where in json_values(path))
    elif ending(path) == ".parquet":
        yield from _parquet_rows(path, field)
    else:
        yield text_of_file(path), str(path)


def rows(path: Path) -> Iterator[tuple[Any, str]]:
    """(row, where it stands) of a JSON file. Raises DataError for another kind, a damaged line or file."""
    if ending(path) not in _JSON:
        raise DataError(f"{path} is not of the kind {', '.join(_JSON)}; conversations are read from those")
    yield from json_values(path)


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row. Raises DataError, with where the row stands, if it has none."""
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no field {field!r} (it has: {keys}); name the field with --field")
    if not isinstance(row[field], str):
        kind = "null" if row[field] is None else type(row[field]).__name__
        raise DataError(f"{where}: the field {field!r} is {kind}, not text")
    return str(row[field])


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet as pq

    number = 0
    try:
        with sentences(path), pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column {column!r} (it has: {there}); name the column with --field")
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield text_of({column: value}, column, f"{path} row {number}"), f"{path} row {number}"
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file, or damaged: {str(error).splitlines()[0]}") from None


_PACKED = (".gz", ".zst")
_NOT_SPACE = re.compile(r"\S")
_CHUNK_BYTES = 1 << 20
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` needs; the library's own limit is 2^27


def ending(path: Path) -> str:
    """What is in the file by its name: `A.JSONL.gz` -> `.jsonl`."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def text_of_file(path: Path) -> str:
    """The whole file, without a byte order mark. Raises DataError if it cannot be read, is damaged, or is not UTF-8."""
    with sentences(path), _unpacked(path) as file:
        return file.read().decode("utf-8-sig")


def json_values(path: Path) -> Iterator[tuple[Any, str]]:
    """(value, where it stands) of JSON lines; or of the items of an array; or of values that each take several lines.

    Raises DataError, with the line, for a damaged file, one that is not UTF-8, or one that is not JSON.
    """
    with sentences(path), _unpacked(path) as file:
        lines = _lines(path, file)
        number, first = next(lines, (0, ""))
        if first.lstrip().startswith("[") or (ending(path) == ".json" and not _is_json(first)):
            yield from _spread(path, "\n" * (number - 1) + first + "".join(line for _, line in lines))
        elif first:
            for place, line in itertools.chain([(number, first)], lines):
                yield _parsed(line, f"{path} line {place}"), f"{path} line {place}"


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers; without a byte order mark."""
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line {number} is not UTF-8 text") from None
        if line.strip():
            yield number, line


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Whatever the system and the libraries say of `path` as a DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); leave it out with --exclude") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        ends = "ends before its compressed data does" if isinstance(error, EOFError) else "is damaged"
        raise DataError(f"{path} {ends}: it is not whole; copy or download it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _unpacked(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if name.endswith(".zst"):
        return io.BufferedReader(_Zst(path), _CHUNK_BYTES)
    return path.open("rb")


class _Zst(io.RawIOBase):
    """Frames of zstd back to back. Raises EOFError inside a frame, where the library's own reader just ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._library = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._made, self._left = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made:
            self._left = self._left or self._file.read(_CHUNK_BYTES)
            if not self._left and self._frame is not None:
                raise EOFError
            if not self._left:
                return 0
            frame = self._frame or self._library.decompressobj()
            self._made = frame.decompress(self._left)
            self._left = frame.unused_data
            self._frame = None if frame.eof else frame
        count = min(len(buffer), len(self._made))
        buffer[:count], self._made = self._made[:count], self._made[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {_why(error)}") from None


def _spread(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    """The values of a whole text; of one that is an array its items."""
    decoder, values, at = json.JSONDecoder(), list[Any](), 0
    while (found := _NOT_SPACE.search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else text.count("\n", 0, found.start()) + 1
            raise DataError(f"{path} line {line} is not JSON: {_why(error)}") from None
        values.append(value)
    items = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    for number, item in enumerate(items, 1):
        yield item, f"{path} item {number}"


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "it is nested too deeply" if isinstance(error, RecursionError) else "it holds a number of too many digits"
