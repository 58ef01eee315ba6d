"""One file as text or as JSON values: unpacked from .gz and .zst, with a sentence for whatever is wrong with it.

A file that ends too early is an error: half a corpus that passes for a whole one is worse than none.
"""

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from thinwire.errors import DataError

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
    import zstandard

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
        import zstandard

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
