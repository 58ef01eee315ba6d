"""Megatron's indexed format, byte for byte, and what damaged files are told."""

import struct
from pathlib import Path

import numpy as np
import pytest

from thinwire.data.indexed import IndexedTokens, IndexedWriter
from thinwire.errors import DataError


def write_by_hand(prefix: Path, documents: list[list[list[int]]], code: int, dtype: str) -> None:
    """An independent writer: documents of sequences of ids, as Megatron-LM lays them out."""
    sequences = [sequence for document in documents for sequence in document]
    raw = b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    prefix.with_suffix(".bin").write_bytes(raw)
    width = np.dtype(dtype).itemsize
    offsets, marks = [0], [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence) * width)
    for document in documents:
        marks.append(marks[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(marks))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    index += b"".join(struct.pack("<q", offset) for offset in offsets[:-1])
    index += b"".join(struct.pack("<q", mark) for mark in marks)
    prefix.with_suffix(".idx").write_bytes(index)


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1"), (3, "<i2")])
def test_files_written_for_megatron_load_as_they_are(tmp_path: Path, code: int, dtype: str) -> None:
    write_by_hand(tmp_path / "m", [[[1, 2, 3], [4]], [[5, 6]], [[7]]], code, dtype)
    read = IndexedTokens(tmp_path / "m")
    assert read.stream.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert read.starts.tolist() == [0, 4, 6]


@pytest.mark.parametrize(("vocab", "code", "dtype"), [(257, 8, "<u2"), (128_256, 4, "<i4")])
def test_our_files_are_megatrons_byte_for_byte(tmp_path: Path, vocab: int, code: int, dtype: str) -> None:
    documents = [[5, 6, 7], [8], [9, 10]]
    write_by_hand(tmp_path / "theirs", [[document] for document in documents], code, dtype)
    writer = IndexedWriter(tmp_path / "ours", vocab)
    writer.add(np.array([5, 6, 7, 8]), np.array([3, 1], np.int32))
    writer.add(np.array([9, 10]), np.array([2], np.int32))
    writer.close()
    for ending in (".bin", ".idx"):
        assert (tmp_path / "ours").with_suffix(ending).read_bytes() == (tmp_path / "theirs").with_suffix(
            ending
        ).read_bytes()


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: _cut(p.with_suffix(".bin"), 6), "has 6 bytes where its index says 14"),
        (lambda p: _cut(p.with_suffix(".idx"), 60), "it is truncated"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"PK\x03\x04 something else entirely, long enough"), "MMIDIDX"),
        (lambda p: p.with_suffix(".bin").unlink(), "does not exist"),
        (lambda p: write_by_hand(p, [[[1]]], 7, "<f4"), "holds float32 numbers"),
        (lambda p: write_by_hand(p, [[[1]]], 99, "<u2"), "number type 99"),
    ],
)
def test_damaged_or_foreign_files_get_a_sentence(tmp_path: Path, damage: object, says: str) -> None:
    prefix = tmp_path / "m"
    write_by_hand(prefix, [[[1, 2, 3], [4]], [[5, 6]], [[7]]], 8, "<u2")
    damage(prefix)  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        IndexedTokens(prefix)
