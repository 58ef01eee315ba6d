"""A preparation that ends early, taken up again: what is on the disk, and how far its sources were read.

Noted every few chunks, after the tokens have reached the disk; what was written behind the last note is cut off and made
again, so the corpus is the same as in one go. Only data sets of the hub are taken up: their identity is known and their
streams say where they stand.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.config import parse_json
from thinwire.data.hub import Place
from thinwire.data.indexed import IndexedWriter, paths_of, sizes_path
from thinwire.files.folders import write_atomic

_FILE = "unfinished.json"
_EVERY = 8
"""Chunks between notes: some 16 million characters."""
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class ReadMark:
    """Everything before this has been read."""

    done: int = 0
    """Bytes of sources begun."""
    number: int = 0
    """Which of the inputs is being read."""
    place: Place | None = None
    """How far; None: not at all, or it cannot be said."""
    mended: int = 0
    """Documents with half a surrogate pair."""
    first_mended: str | None = None
    """Where the first of them stands."""


def key_of(*parts: Any) -> str:
    """One word for all that must be the same for a preparation to be taken up."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Journal:
    """The notes of one folder. Without a key nothing is noted and nothing taken up."""

    def __init__(self, folder: Path, key: str | None) -> None:
        self._path, self._key, self._chunks = folder / _FILE, key, 0

    def begun(self) -> tuple[Counts, ReadMark] | None:
        """The last note, or None if there is nothing to take up: no note, another key, or files shorter than it says."""
        try:
            note = parse_json(self._path.read_bytes())
            if self._key is None or note["key"] != self._key or not self._holds(note["bytes"]):
                return None
            return note["counts"], ReadMark(**note["mark"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or no note of ours
            return None

    def note(self, writers: Iterable[IndexedWriter], counts: Counts, mark: ReadMark) -> None:
        """Called after each chunk."""
        self._chunks += 1
        if self._key is None or mark.place is None or self._chunks % _EVERY:
            return
        for writer in writers:
            writer.sync()
        sizes = {path.name: path.stat().st_size for name in counts for path in self._files(name)}
        note = {"key": self._key, "counts": counts, "mark": vars(mark), "bytes": sizes}
        write_atomic(self._path, json.dumps(note))

    def remove(self) -> None:
        """The corpus is whole."""
        self._path.unlink(missing_ok=True)

    def _files(self, name: str) -> tuple[Path, Path]:
        prefix = self._path.parent / name
        return paths_of(prefix)[0], sizes_path(prefix)

    def _holds(self, sizes: dict[str, int]) -> bool:
        there = [self._path.with_name(name) for name in sizes]
        return all(path.is_file() and path.stat().st_size >= sizes[path.name] for path in there)
