"""Text to token files: read in order, tokenised in parallel, written in order, renamed into place when whole.

Everything is written in a hidden folder beside the target; a run that is interrupted, however, leaves no target. From
data sets of the hub the next run goes on from there. The result does not depend on the number of workers.
"""

import hashlib
import json
import multiprocessing as mp
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.corpus import FORMAT, MANIFEST, PREFIXES
from thinwire.data.indexed import IndexedWriter, dtype_for, paths_of
from thinwire.data.inputs import Input, identities, texts_of
from thinwire.data.tokenizer import ByteTokenizer, Tokenizer, load_file, parse_choice, train_bpe
from thinwire.data.unfinished import Journal, ReadMark, key_of
from thinwire.errors import DataError
from thinwire.files.folders import atomic_folder

_CHUNK_CHARS = 1 << 21
_HASH_BYTES = 8
_HALVES = re.compile("[\ud800-\udfff]")
_COUNTED = ("documents", "tokens", "bytes", "bytes_of_tokens", "unknown_tokens", "spelling_special_tokens")


@dataclass(frozen=True)
class Options:
    """What to read and how to tokenise it."""

    sources: tuple[str, ...]
    tokenizer: str = "bytes"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    field: str = "text"
    validation_fraction: float = 0.02
    special_tokens: bool = False
    """Special tokens that a text spells out become those; else they are ordinary text."""


Texts = Input[tuple[str, str]]
Progress = Callable[[str, int, int | None], None]
"""Called with (phase, bytes of sources done, bytes of all sources or None if they are not known)."""


def prepare(
    options: Options, out: Path, *, workers: int | None = None, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the corpus folder `out` and return its manifest.

    Raises DataError: no such source, no documents, not text, a target that exists (unless `force`), no room on disk.
    """
    inputs = texts_of(options.sources, field=options.field, include=options.include, exclude=options.exclude)
    choice = parse_choice(options.tokenizer)
    key = _key(options, inputs, choice)
    with atomic_folder(
        out, force=force, error=DataError, goes_on=lambda f: Journal(f, key).begun() is not None
    ) as folder:
        journal = Journal(folder, key)
        return _fill(folder, options, inputs, choice, workers or os.cpu_count() or 1, progress or _silent, journal)


def _key(options: Options, inputs: Sequence[Texts], choice: int | Path | None) -> str | None:
    """What this preparation is, if it can be taken up after it ended early."""
    if any(one.place is None for one in inputs):
        return None
    tokenizer = hashlib.sha256(choice.read_bytes()).hexdigest() if isinstance(choice, Path) and choice.is_file() else ""
    named = asdict(options)
    named["heldout_fraction"] = named.pop("validation_fraction")  # its name when the first journals were written
    return key_of(named, [one.identity for one in inputs], tokenizer)


def _silent(phase: str, done: int, total: int | None) -> None:
    """No progress wanted."""


def _fill(
    folder: Path,
    options: Options,
    inputs: Sequence[Texts],
    choice: int | Path | None,
    workers: int,
    progress: Progress,
    journal: Journal,
) -> dict[str, Any]:
    """Tokenizer, token files and manifest into `folder`, going on where `journal` says."""
    total = _total_bytes(inputs)
    begun = journal.begun()
    spec = "bytes" if choice is None else str(folder / "tokenizer.json")
    if begun:
        tokenizer = _open(spec)
    else:
        tokenizer = _tokenizer(options, inputs, choice, lambda done: progress("training the tokenizer", done, total))
        tokenizer.save(folder)
    counts, end = begun or ({name: dict.fromkeys(_COUNTED, 0) for name in PREFIXES}, ReadMark())
    with ExitStack() as open_files:
        writers = {n: open_files.enter_context(_writer(folder / n, tokenizer, counts[n])) for n in PREFIXES}
        for chunk, mark in _tokenised(_chunks(inputs, end), spec, options, workers):
            for name, part in chunk.items():
                writers[name].add(part.tokens, part.sizes)
                _count(counts[name], part)
            journal.note(writers.values(), counts, mark)
            progress("tokenising", mark.done, total)
            end = mark
        journal.remove()
        for writer in writers.values():
            writer.close()
    if counts["train"]["tokens"] == 0:
        raise nothing_to_train_on(options.sources, len(inputs), counts["heldout"]["documents"], "text")
    manifest = {
        "format": FORMAT,
        "tokenizer": {"file": "bytes" if spec == "bytes" else "tokenizer.json", "vocab_size": tokenizer.vocab_size},
        "sources": list(options.sources),
        **identities(inputs),
        "heldout_fraction": options.validation_fraction,
        "special_tokens": options.special_tokens,
        **({"mended": {"documents": end.mended, "first": end.first_mended}} if end.mended else {}),
        "splits": {name: {**counts[name], **digests(folder / name)} for name in PREFIXES},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _writer(prefix: Path, tokenizer: Tokenizer, kept: dict[str, int]) -> IndexedWriter:
    return IndexedWriter(prefix, tokenizer.vocab_size, documents=kept["documents"], tokens=kept["tokens"])


def _count(counts: dict[str, int], part: "_Part") -> None:
    counts["documents"] += part.sizes.size
    counts["tokens"] += part.tokens.size
    counts["bytes"] += part.text_bytes
    counts["bytes_of_tokens"] += part.bytes_of_tokens
    counts["unknown_tokens"] += part.unknown
    counts["spelling_special_tokens"] += part.spelling


def nothing_to_train_on(sources: Sequence[str], inputs: int, validation: int, what: str) -> DataError:
    """Why the training split is empty."""
    read = f"{', '.join(sources)}: no {what} in {inputs} files or data sets"
    if validation:
        fell = f"all {validation} documents fell into the validation split"
        read = f"{', '.join(sources)}: {fell}; lower --validation-fraction"
    return DataError(f"{read}; nothing to train on")


def _tokenizer(
    options: Options, inputs: Sequence[Texts], choice: int | Path | None, progress: Callable[[int], None]
) -> Tokenizer:
    if choice is None:
        return ByteTokenizer()
    if isinstance(choice, Path):
        return load_file(choice)

    def training_texts() -> Iterator[str]:
        for texts, mark in _chunks(inputs, ReadMark()):
            progress(mark.done)
            yield from (text for text in texts if not held_out(text.encode("utf-8"), options.validation_fraction))

    return train_bpe(choice, training_texts())


def held_out(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its content alone, so copies stay together."""
    digest = hashlib.blake2b(text, digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "little") < int(fraction * 2.0 ** (8 * _HASH_BYTES))


def _total_bytes(inputs: Sequence[Texts]) -> int | None:
    sizes = [one.size_bytes for one in inputs if one.size_bytes is not None]
    return sum(sizes) if len(sizes) == len(inputs) else None


def _chunks(inputs: Sequence[Texts], start: ReadMark) -> Iterator[tuple[list[str], ReadMark]]:
    """Documents in order, after `start`, about two million characters at a time, each with the mark it ends at.

    Of a data set whose size is not known, the characters read count instead.
    """
    texts: list[str] = []
    size, mark = 0, start
    for number, one in enumerate(inputs[start.number :], start.number):
        mark = replace(mark, done=mark.done + (one.size_bytes or 0), number=number)
        for text, where in one.read(start.place) if start.place and number == start.number else one.read():
            done = mark.done + (len(text) if one.size_bytes is None else 0)
            whole = mended(text)
            first = mark.first_mended or (where if whole != text else None)
            mark = replace(mark, done=done, mended=mark.mended + (whole != text), first_mended=first)
            if not text:
                continue
            texts.append(whole)
            size += len(text)
            if size >= _CHUNK_CHARS:
                yield texts, replace(mark, place=one.place() if one.place else None)
                texts, size = [], 0
    if texts:
        yield texts, replace(mark, place=None)


def mended(text: str) -> str:
    """`text` with U+FFFD, the replacement character, for every half of a surrogate pair, which UTF-8 cannot hold."""
    return text if text.isascii() else _HALVES.sub("\ufffd", text)


@dataclass(frozen=True)
class _Part:
    """Tokenised documents of one split: ids back to back, each document ended by the end-of-text id."""

    tokens: NDArray[Any]
    sizes: NDArray[np.int32]
    text_bytes: int
    bytes_of_tokens: int
    """What the ids stand for; other than `text_bytes` where the tokenizer changes text."""
    unknown: int
    """Tokens that stand for what the vocabulary cannot write."""
    spelling: int
    """Documents that spell out special tokens."""


def _tokenised(
    chunks: Iterable[tuple[list[str], ReadMark]], spec: str, options: Options, workers: int
) -> Iterator[tuple[dict[str, _Part], ReadMark]]:
    """Chunks tokenised by `workers` processes, in order; one worker works in this process."""
    if workers == 1:
        tokenizer = _open(spec)
        for texts, mark in chunks:
            yield tokenise(texts, tokenizer, options.validation_fraction, special=options.special_tokens), mark
        return
    context = mp.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(spec,)) as pool:
        waiting: deque[tuple[Future[dict[str, _Part]], ReadMark]] = deque()
        for texts, mark in chunks:
            waiting.append((pool.submit(_work, texts, options.validation_fraction, options.special_tokens), mark))
            if len(waiting) > 2 * workers:
                first, its_mark = waiting.popleft()
                yield first.result(), its_mark
        for first, its_mark in waiting:
            yield first.result(), its_mark


def tokenise(texts: Sequence[str], tokenizer: Tokenizer, fraction: float, *, special: bool = False) -> dict[str, _Part]:
    """Documents to ids, parted into training and validation split."""
    dtype = dtype_for(tokenizer.vocab_size)
    end = np.array([tokenizer.eot], dtype)
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in PREFIXES}
    sums = {name: dict.fromkeys(("text_bytes", "unknown", "spelling"), 0) for name in PREFIXES}
    for text, ids in zip(texts, tokenizer.encode_many(texts, special=special), strict=True):
        raw = text.encode("utf-8")
        name = "heldout" if held_out(raw, fraction) else "train"
        rows[name].append(ids.astype(dtype))
        sums[name]["text_bytes"] += len(raw)
        sums[name]["unknown"] += 0 if tokenizer.unknown is None else int((ids == tokenizer.unknown).sum())
        sums[name]["spelling"] += tokenizer.spells_special(text)
    parts = {}
    for name, arrays in rows.items():
        sizes = np.array([array.size + 1 for array in arrays], np.int32)
        tokens = np.concatenate([np.zeros(0, dtype), *(piece for array in arrays for piece in (array, end))])
        stood = int(tokenizer.token_bytes()[tokens].sum())
        parts[name] = _Part(tokens, sizes, bytes_of_tokens=stood, **sums[name])
    return parts


def _open(spec: str) -> Tokenizer:
    return ByteTokenizer() if spec == "bytes" else load_file(Path(spec))


class _Worker:
    """The tokenizer of a worker process."""

    tokenizer: Tokenizer


def _start_worker(spec: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.tokenizer = _open(spec)
    parent = mp.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Any) -> None:
    """No worker outlives the process that started it."""
    parent.join()
    os._exit(1)


def _work(texts: list[str], fraction: float, special: bool) -> dict[str, _Part]:
    return tokenise(texts, _Worker.tokenizer, fraction, special=special)


def digests(prefix: Path) -> dict[str, str]:
    """sha256 of the token file and its index."""
    out = {}
    for path in paths_of(prefix):
        with path.open("rb") as file:
            out[f"{path.suffix[1:]}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return out
