"""Files as users have them: every ending and form of JSON, packed or not; what is no file or not whole gets a sentence."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from thinwire.data.prepare import Options, prepare
from thinwire.data.sources import documents, files_of, rows
from thinwire.errors import DataError

ROWS = [{"text": "first"}, {"text": "zweites é€"}, {"text": "third\nline"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FORMS = {
    "lines": LINES,
    "array": json.dumps(ROWS).encode(),
    "indented array": b"\n" + json.dumps(ROWS, indent=2).encode(),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "mark": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
}
BIG = "".join(json.dumps({"text": f"document {n} " + os.urandom(40).hex()}) + "\n" for n in range(4000)).encode()


def texts(path: Path) -> list[str]:
    return [text for text, _ in documents(path)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.json", "A.JSON", "a.json.gz", "a.Json.Zst"])
def test_json_is_read_as_what_it_is(tmp_path: Path, name: str, form: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    (tmp_path / name).write_bytes(pack(FORMS[form]))
    assert texts(tmp_path / name) == [row["text"] for row in ROWS]
    assert [row for row, _ in rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.NdJson.GZ"])
def test_json_lines_have_several_endings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.lower().endswith(".gz") else LINES)
    assert texts(tmp_path / name) == [row["text"] for row in ROWS]
    assert [where for _, where in documents(tmp_path / name)][1].endswith(f"{name} line 2")


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz", "a.md.zst"])
def test_text_is_unpacked_and_kept_as_it_is(tmp_path: Path, name: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + pack("one\r\ntwo é".encode()) if pack is bytes else pack(b"x\r\ny"))
    assert texts(tmp_path / name) == ["one\r\ntwo é" if pack is bytes else "x\r\ny"]


def test_members_and_frames_back_to_back_are_one_file(tmp_path: Path) -> None:
    half = BIG.index(b"\n", len(BIG) // 2) + 1
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(BIG[:half]) + pack(BIG[half:]))
        assert len(texts(tmp_path / name)) == 4000
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"  # as pzstd writes them
    whole = zstandard.compress(BIG)
    for name, data in (("c", skippable + whole), ("d", whole + skippable)):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(data)
        assert len(texts(tmp_path / f"{name}.jsonl.zst")) == 4000
    long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28))
    (tmp_path / "b.jsonl.zst").write_bytes(long.compress(BIG))
    assert len(texts(tmp_path / "b.jsonl.zst")) == 4000


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 64]) + data[middle + 64 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda data: data + b"rest", lambda data: b"\x00" + data])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.zst", "a.txt.gz"])
def test_a_packed_file_that_is_not_whole_makes_no_corpus(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    packed = gzip.compress(BIG) if name.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress(BIG)
    (tmp_path / name).write_bytes(damage(packed))
    told = f"{name} .*it is not whole; copy or download it again"
    if damage is _flip:  # wrong bytes may be met before the checksum is
        told += f"|{name} (line [0-9]+ )?is not (JSON|UTF-8)"
    with pytest.raises(DataError, match=told):
        prepare(Options((str(tmp_path / name),)), tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', "line 1 is not JSON"),
        ("a.json", b'{\n "text": "a"\n}\n{\n "text": }', "line 5 is not JSON"),
        ("a.jsonl", b'\n{"text": "a"}\n\xff\n', "line 3 is not UTF-8 text"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n' + b'{"a":' * 100_000, "line 2 is not JSON: it is nested too deeply"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "a number of too many digits"),
        ("a.json", b'[{"text": "a"}, {"text": null}]', "item 2: the field 'text' is null, not text"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"line 1 has no field 'text' \(it has: data\)"),
        ("a.parquet", b"PAR1 and no more", "is not a parquet file, or damaged"),
        ("a.txt", b"ab\xff", r"is not UTF-8 text \(byte 2\)"),
        ("a.tar.gz", b"", "is an archive of files; unpack it"),
        ("a.ZIP", b"", "is an archive of files; unpack it"),
    ],
)
def test_wrong_content_is_named_by_its_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare(Options((str(tmp_path / name),)), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _broken(path: Path) -> None:
    path.symlink_to("nowhere")


def _itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_pipe, "is a pipe, a socket or a device"),
        (_broken, "is a link to what does not exist"),
        (_itself, "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_gets_a_sentence_alone_and_in_a_folder(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("text")
    make(tmp_path / "s" / "odd")
    with pytest.raises(DataError, match=f"odd {says}.*; leave it out with --exclude"):
        files_of(str(tmp_path / "s"))
    with pytest.raises(DataError, match=f"odd {says}"):
        files_of(str(tmp_path / "s" / "odd"))
    assert [path.name for path in files_of(str(tmp_path / "s"), exclude=["odd"])] == ["a.txt"]
    assert [path.name for path in files_of(str(tmp_path / "s"), include=["*.txt"])] == ["a.txt"]


def test_links_to_folders_are_followed_and_circles_are_told(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
        (folder / "a.txt").write_text("text")
    (data / "linked").symlink_to(other)
    assert [path.relative_to(data).as_posix() for path in files_of(str(data))] == ["a.txt", "linked/a.txt"]
    (other / "back").symlink_to(data)
    with pytest.raises(DataError, match=r"linked/back is a link back to .*data, which it is in; leave it out"):
        files_of(str(data))
    for glob in ("back", "linked/back", "linked/back/*", "*/back"):
        assert len(files_of(str(data), exclude=[glob])) == 2


def test_names_that_no_file_can_have_get_a_sentence(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(DataError, match="does not exist; give a file, a folder"):
            files_of(str(tmp_path / name))


def test_an_archive_is_not_taken_for_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    with pytest.raises(DataError, match="unpack it, and leave it out with --exclude"):
        files_of(str(tmp_path))


def test_halves_of_surrogate_pairs_are_replaced_and_told(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', r'{"text": "cut \ud83d here"}', r'{"text": "\udc00\ude00 whole \ud83d\ude00"}']
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    for tokenizer in ("bytes", "bpe:280"):
        options = Options((str(tmp_path / "s.jsonl"),), tokenizer, validation_fraction=0.0)
        manifest = prepare(options, tmp_path / tokenizer, workers=1)
        assert manifest["mended"] == {"documents": 2, "first": f"{tmp_path / 's.jsonl'} line 2"}
        text = "good" + "cut \ufffd here" + "\ufffd\ufffd whole \U0001f600"
        assert manifest["splits"]["train"]["bytes"] == len(text.encode())
