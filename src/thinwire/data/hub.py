"""Data sets of the Hugging Face hub, and local folders of the same kind, as streams of the `datasets` library.

A source is `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`. Rows come in the data set's own order and at the revision found when it
was opened, so reading it twice gives the same. Neither memory nor disk ever holds a copy of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.data.sources import text_of
from thinwire.errors import DataError, ThinwireError

Place = dict[str, Any]
"""How far a data set has been read, as JSON can hold it."""
PREFIX = "hf:"
_FORM = "hf:NAME[@REVISION][:CONFIG[:SPLIT]]"
_DEFAULT_FIELD = "text"
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves, alone and with splits
_CACHED = "cache"  # the builder that the library falls back to without network
_STRINGS = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class HubSource:
    """Which rows: a name on the hub or a folder, its revision and config (None: its default), its split."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    @property
    def folder(self) -> Path | None:
        return Path(self.name) if Path(self.name).is_dir() else None


def parse(written: str) -> HubSource:
    """`hf:NAME:CONFIG:SPLIT` in parts; an empty CONFIG is the default one. Raises DataError for any other form."""
    name, *parts = written.removeprefix(PREFIX).split(":")
    revision = None
    if "@" in name and not Path(name).is_dir():
        name, _, revision = name.partition("@")
    if not name or revision == "" or len(parts) > 2 or (parts and not parts[-1]):
        raise DataError(f"{written} is not of the form {_FORM}; hf:NAME::SPLIT leaves the config out")
    config, split = [*parts, *["", "train"][len(parts) :]]
    source = HubSource(name, revision, config or None, split)
    if source.folder and revision:
        raise DataError(f"{written}: {name} is a folder of this machine, which has no revisions; leave @{revision} out")
    if Path(name).is_file():
        raise DataError(f"{written}: {name} is a file; give it without hf:, or the folder that it is in")
    return source


@dataclass
class HubRows:
    """One split of a data set, opened. What the library raises comes as DataError with its sentence."""

    written: str
    stream: Any
    identity: dict[str, str | None]
    """`source` `name` `config` `split`, a hub's `revision` or a folder's `fingerprint`, as `datasets` tells them; and the
    `reader`, as places are only good for the same one."""
    _reading: Any = None
    _row: int = 0

    def column(self, field: str) -> str:
        """`field`; or where `text` is asked for and not there, the only column of text. Raises DataError."""
        names, texts = self._columns()
        if field in names:
            return field
        if field == _DEFAULT_FIELD and len(texts) == 1:
            return texts[0]
        there = ", ".join(names)
        raise DataError(
            f"{self.written} has no column {field!r} (it has: {there}); name the column with --field or data.field"
        )

    def texts(self, column: str, start: Place | None = None) -> Iterator[tuple[str, str]]:
        """(text, where it stands) of a column, after `start`. Raises DataError for a row without text, or no rows."""
        for row, where in self.rows([column], start):
            yield text_of(row, column, where), where

    def rows(self, columns: list[str], start: Place | None = None) -> Iterator[tuple[dict[str, Any], str]]:
        """({column: value}, where it stands), in order, after `start`. Raises DataError if there are no rows."""
        self._reading, self._row = self.stream.select_columns(columns), 0
        if start is not None:
            self._reading.load_state_dict(start["stream"])
            self._row = start["row"]
        with _as_data_errors(self.written):
            for row in self._reading:
                self._row += 1
                yield {name: _as_written(value) for name, value in row.items()}, f"{self.written} row {self._row}"
        if self._row == 0:
            raise _no_rows(self.written)

    def place(self) -> Place:
        """After the row that came last: where a later reading, of a later process too, can start."""
        return {"row": self._row, "stream": self._reading.state_dict()}

    def names(self) -> list[str]:
        """Its columns."""
        return self._columns()[0]

    def _columns(self) -> tuple[list[str], list[str]]:
        """All columns, and those of text: as declared, or where nothing is, as the first row has them."""
        with _as_data_errors(self.written):
            features = self.stream.features
            if features is not None:
                return list(features), [n for n, kind in features.items() if getattr(kind, "dtype", None) in _STRINGS]
            first = next(iter(self.stream), None)
        if first is None:
            raise _no_rows(self.written)
        return list(first), [name for name, value in first.items() if isinstance(value, str)]


def open_hub(written: str) -> HubRows:
    """The split that an `hf:` source means, ready to be read.

    Raises DataError: a malformed source, no `datasets` library, no such data set, config or split, no way to the hub.
    """
    source = parse(written)
    library = _library(written)
    with _as_data_errors(written):
        splits = (_saved if _is_saved(source.folder) else _built)(library, source, written)
    if source.split not in splits:
        raise DataError(f"{written} has no split {source.split!r}; it has: {', '.join(splits)}")
    split = splits[source.split]
    identity = {"source": written, "name": source.name, "config": split.config, "split": source.split}
    identity["fingerprint" if source.folder else "revision"] = split.version
    identity["reader"] = f"{split.kind} of datasets {library.__version__}"
    return HubRows(written, split.stream, identity)


@dataclass(frozen=True)
class _HubSplit:
    stream: Any
    kind: str
    config: str | None
    version: str | None


def _library(written: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{written} needs the datasets library; pip install 'thinwire[hf]'") from None
    return datasets


def _built(library: Any, source: HubSource, written: str) -> dict[str, _HubSplit]:
    """Of data files, by a builder of the library. A folder goes by its whole path: `csv` alone names a builder."""
    path = str(source.folder.resolve()) if source.folder else source.name
    try:
        builder = library.load_dataset_builder(path, source.config, revision=source.revision)
    except ValueError as error:
        configs = library.get_dataset_config_names(path, revision=source.revision)
        if source.config in configs or (source.config is None and len(configs) == 1):
            raise
        what = f"has no config {source.config!r}" if source.config else "has several configs, and none is its default"
        raise DataError(f"{written} {what}; it has: {', '.join(configs)}") from error
    if builder.name == _CACHED and source.revision not in (None, builder.hash):
        raise DataError(
            f"{written}: the hub cannot be reached and its cached copy is of revision {builder.hash}, not "
            f"{source.revision}; try again with network"
        )
    streams = builder.as_streaming_dataset()
    return {
        name: _HubSplit(stream, builder.name, builder.config.name, builder.hash) for name, stream in streams.items()
    }


def _is_saved(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in _SAVED)


def _saved(library: Any, source: HubSource, written: str) -> dict[str, _HubSplit]:
    """Of a folder that `save_to_disk` wrote: memory-mapped, not copied."""
    if source.config:
        raise DataError(f"{written}: a data set saved with save_to_disk has no configs; leave {source.config!r} out")
    if not any(Path(source.name).rglob("*.arrow")):  # the library writes none for no rows, and cannot load that
        raise _no_rows(written)
    found = library.load_from_disk(source.name)
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    return {name: _HubSplit(one.to_iterable_dataset(), "saved", None, one._fingerprint) for name, one in splits.items()}


@contextmanager
def _as_data_errors(written: str) -> Iterator[None]:
    """Whatever the library raises, which is of many kinds, as one sentence."""
    try:
        yield
    except ThinwireError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        away = "; without network give a folder of this machine" if isinstance(error, ConnectionError) else ""
        raise DataError(f"{written} cannot be read: {line}{away}") from None


def _no_rows(written: str) -> DataError:
    return DataError(f"{written} has no rows; nothing to train on")


def _as_written(value: Any) -> Any:
    """Messages, tools and the like without the keys that stand there only because others, in any row, have them."""
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items() if item is not None or key == "content"}
    return value
