"""Megatron-LM's indexed dataset: PREFIX.bin holds token ids back to back, PREFIX.idx where sequences and documents are.

Layout of .idx, little-endian (Megatron-LM, core/datasets/indexed_dataset.py): magic `MMIDIDX\\0\\0`, uint64 version 1,
uint8 dtype code, uint64 number of sequences, uint64 number of document marks, then int32 sizes, int64 byte offsets,
int64 document marks (first sequence of each document, and the end). Corpora tokenised for Megatron or NeMo load as is.
"""

import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_SIZE = np.dtype("<i4")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip


def paths_of(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def answers_path(prefix: Path) -> Path:
    """PREFIX.answers: a byte per token, 1 where it is to be learned. Only corpora made of conversations have it."""
    return prefix.with_name(prefix.name + ".answers")


def sizes_path(prefix: Path) -> Path:
    """PREFIX.sizes: an int32 per document, there only while the dataset is being written."""
    return prefix.with_name(prefix.name + ".sizes")


def dtype_for(vocab_size: int) -> type[np.generic]:
    """uint16 while ids fit with Megatron's margin, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Appends documents; `close()` writes the index. One sequence per document. As a context it never leaks its files.

    Given the `documents` and `tokens` that an earlier writer had synced, it goes on after those.
    """

    def __init__(self, prefix: Path, vocab_size: int, *, documents: int = 0, tokens: int = 0) -> None:
        self._dtype = np.dtype(dtype_for(vocab_size))
        bin_path, self._idx_path = paths_of(prefix)
        self._sizes_path = sizes_path(prefix)
        self._bin = _open_at(bin_path, tokens * self._dtype.itemsize)
        self._sizes = _open_at(self._sizes_path, documents * _SIZE.itemsize)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._bin.close()
        self._sizes.close()

    def add(self, tokens: NDArray[Any], sizes: NDArray[np.int32]) -> None:
        """Documents back to back in `tokens`, their lengths in `sizes`."""
        assert int(sizes.sum()) == tokens.size
        self._bin.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._sizes.write(sizes.astype(_SIZE).tobytes())

    def sync(self) -> None:
        """What was added is on the disk when this returns."""
        for file in (self._bin, self._sizes):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self._bin.close()
        self._sizes.close()
        sizes = np.fromfile(self._sizes_path, _SIZE)
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]) if sizes.size else np.zeros(0)
        code = next(code for code, dtype in _DTYPES.items() if np.dtype(dtype) == self._dtype)
        with self._idx_path.open("wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, code, sizes.size, sizes.size + 1))
            index.write(sizes.tobytes())
            index.write((offsets * self._dtype.itemsize).astype(np.int64).tobytes())
            index.write(np.arange(sizes.size + 1, dtype=np.int64).tobytes())
        self._sizes_path.unlink()


def _open_at(path: Path, size: int) -> IO[bytes]:
    """To write on after the first `size` bytes; what stands behind them goes."""
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


class IndexedTokens:
    """A memory-mapped dataset as one stream of tokens with document starts.

    Attributes: `stream` (N,) ids; `starts` (documents,) position of each document's first token in the stream;
    `answers` (N,) 1 for tokens to be learned, or None if all are.
    Raises DataError for a missing, truncated or foreign file, with the sizes.
    """

    def __init__(self, prefix: Path) -> None:
        bin_path, idx_path = paths_of(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist; give a folder made by `thinwire data prepare` or a prefix")
        sizes, offsets, marks, dtype = _read_index(idx_path)
        expected = int(sizes.sum(dtype=np.int64)) * dtype.itemsize
        found = bin_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{bin_path} has {found:,} bytes where its index says {expected:,}; it is damaged, make it anew"
            )
        ends = np.cumsum(sizes, dtype=np.int64)
        begins = ends - sizes
        if not np.array_equal(offsets, begins * dtype.itemsize):
            raise DataError(f"{idx_path}: sequences do not lie back to back in {bin_path.name}; make it anew")
        self.stream: NDArray[Any] = np.memmap(bin_path, dtype, "r") if expected else np.zeros(0, dtype)
        self.starts: NDArray[np.int64] = begins[marks[:-1][marks[:-1] < sizes.size]]
        self.answers = _read_answers(answers_path(prefix), self.tokens)

    @property
    def tokens(self) -> int:
        return int(self.stream.size)

    @property
    def documents(self) -> int:
        return int(self.starts.size)


def _read_answers(path: Path, tokens: int) -> NDArray[np.uint8] | None:
    if not path.is_file():
        return None
    if path.stat().st_size != tokens:
        raise DataError(
            f"{path} marks {path.stat().st_size:,} tokens, there are {tokens:,}; it is damaged, make it anew"
        )
    return np.memmap(path, np.uint8, "r") if tokens else np.zeros(0, np.uint8)


def _read_index(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], np.dtype[Any]]:
    raw = path.read_bytes()
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise DataError(f"{path} is not an index of Megatron's format (it does not start with MMIDIDX)")
    _, version, code, sequences, marks = _HEADER.unpack_from(raw)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{path} is of version {version} with number type {code}; version 1 and types 1 to 8 are known")
    dtype = np.dtype(_DTYPES[code])
    if dtype.kind == "f":
        raise DataError(f"{path} holds {dtype.name} numbers, not token ids")
    expected = _HEADER.size + sequences * 12 + marks * 8
    if len(raw) < expected:
        raise DataError(
            f"{path} has {len(raw):,} bytes where {sequences:,} sequences need {expected:,}; it is truncated"
        )
    sizes = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    return sizes, offsets, np.frombuffer(raw, "<i8", marks, _HEADER.size + 12 * sequences), dtype
