"""Preparation: every source, the same result for any number of workers, nothing half-made."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from runs import make_text
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.data.notes import notes
from thinwire.data.prepare import Options, held_out, prepare
from thinwire.data.sources import documents, files_of
from thinwire.errors import DataError

TEXTS = ["first document\n", "zweites Dokument: äöü €", "third\nwith lines", "x" * 500]


def corpus_texts(folder: Path, split: str = "train") -> list[str]:
    """The documents of a prepared corpus, decoded."""
    corpus = Corpus.open(DataConfig(path=folder))
    tokens = getattr(corpus, split)
    assert corpus.tokenizer is not None
    ends = [*tokens.starts[1:], tokens.tokens]
    return [
        corpus.tokenizer.decode(tokens.stream[a : b - 1].tolist()) for a, b in zip(tokens.starts, ends, strict=True)
    ]


def write_source(folder: Path, kind: str) -> Path:
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"source{kind}"
    if kind == ".jsonl":
        path.write_bytes(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == ".jsonl.zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    elif kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), path)
    else:
        path.mkdir()
        for i, text in enumerate(TEXTS):
            (path / f"{i}.txt").write_text(text)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ""])
def test_every_source_gives_its_documents_back(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind)
    manifest = prepare(Options((str(source),), heldout_fraction=0.0), tmp_path / "out", workers=1)
    assert corpus_texts(tmp_path / "out") == TEXTS
    assert manifest["splits"]["train"]["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text", 50)
    for workers in (1, 2):
        prepare(Options((str(text),), "bpe:300", heldout_fraction=0.2), tmp_path / str(workers), workers=workers)
    for name in ("train.bin", "train.idx", "heldout.bin", "corpus.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_held_out_split_is_decided_by_content(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text", 200)
    prepare(Options((str(text),), heldout_fraction=0.25), tmp_path / "out", workers=1)
    heldout = corpus_texts(tmp_path / "out", "heldout")
    assert 25 < len(heldout) < 75
    assert all(held_out(document.encode(), 0.25) for document in heldout)
    assert not set(heldout) & set(corpus_texts(tmp_path / "out"))


def test_bpe_round_trips_and_knows_its_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path, "")
    prepare(Options((str(source),), "bpe:280", heldout_fraction=0.0), tmp_path / "out", workers=1)
    assert corpus_texts(tmp_path / "out") == TEXTS
    corpus = Corpus.open(DataConfig(path=tmp_path / "out"))
    assert corpus.token_bytes is not None
    counted = corpus.token_bytes[np.asarray(corpus.train.stream, dtype=np.int64)].sum()
    assert counted == sum(len(text.encode()) for text in TEXTS)


def test_settings_inside_a_tokenizer_file_neither_shorten_nor_fill_a_corpus(tmp_path: Path) -> None:
    source = write_source(tmp_path, "")
    prepare(Options((str(source),), "bpe:280", heldout_fraction=0.0), tmp_path / "a", workers=1)
    library = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    library.enable_truncation(7)
    library.enable_padding(length=64, pad_id=3, pad_token="!")
    library.save(str(tmp_path / "set.json"))
    prepare(Options((str(source),), str(tmp_path / "set.json"), heldout_fraction=0.0), tmp_path / "b", workers=1)
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b" / "train.bin").read_bytes()
    kept = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    assert kept["truncation"] is None and kept["padding"] is None


def test_a_tokenizer_file_is_taken_as_it_is(tmp_path: Path) -> None:
    source = write_source(tmp_path, "")
    prepare(Options((str(source),), "bpe:280", heldout_fraction=0.0), tmp_path / "a", workers=1)
    prepare(
        Options((str(source),), str(tmp_path / "a" / "tokenizer.json"), heldout_fraction=0.0), tmp_path / "b", workers=1
    )
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b" / "train.bin").read_bytes()


def test_globs_choose_files(tmp_path: Path) -> None:
    folder = make_text(tmp_path / "text", 12)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.py").write_text("x")
    assert [path.name for path in files_of(str(folder), include=["*.py"])] == ["a.py"]
    assert len(files_of(str(folder), exclude=["000*", "sub/*"])) == 2
    with pytest.raises(DataError, match="holds no files that match"):
        files_of(str(folder), include=["*.md"])


@pytest.mark.parametrize("fraction", [0.999999, 0.02])
def test_an_empty_or_small_split_is_told(tmp_path: Path, fraction: float) -> None:
    options = Options((str(make_text(tmp_path / "text", 5)),), heldout_fraction=fraction)
    if fraction > 0.5:
        with pytest.raises(DataError, match="all 5 documents fell into the validation split; lower"):
            prepare(options, tmp_path / "out", workers=1)
        return
    assert notes(prepare(options, tmp_path / "out", workers=1)) == [
        "none of the 5 documents was held out (heldout_fraction = 0.02), so there is no validation; raise it"
    ]
    more = replace(options, heldout_fraction=0.5)
    (told,) = notes(prepare(more, tmp_path / "more", workers=1))
    assert re.match(r"validation has [1-4] of the 5 documents with \d+ scored tokens, too few", told)
    assert notes(prepare(replace(options, heldout_fraction=0.0), tmp_path / "none", workers=1)) == []


def test_the_library_of_this_interpreter_is_a_corpus() -> None:
    files = files_of("stdlib")
    assert sum(path.stat().st_size for path in files) > 8_000_000
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    assert "def " in next(documents(next(path for path in files if path.name == "argparse.py")))[0]


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda f: None, {}, "does not exist"),
        (lambda f: (f / "s").mkdir(), {}, "holds no files"),
        (lambda f: (f / "s").write_text(""), {}, "no text in 1 files"),
        (lambda f: (f / "s").write_bytes(b"\xff\xfe\x00"), {}, "is not UTF-8 text"),
        (lambda f: (f / "s").write_text("text"), {"tokenizer": "bpe:many"}, "has no size"),
        (lambda f: (f / "s").write_text("text"), {"tokenizer": "bpe:4²"}, "has no size"),
        (lambda f: (f / "s").write_text("text"), {"tokenizer": "bpe:256"}, "has no size from 257"),
        (lambda f: (f / "s").write_text("text"), {"tokenizer": "bpe:99999999999"}, "has no size from 257"),
        (lambda f: (f / "s").write_text("text"), {"tokenizer": "bpe:100"}, "has no size from 257"),
        (lambda f: (f / "s").write_text("text"), {"tokenizer": "missing.json"}, "no tokenizer file"),
    ],
)
def test_wrong_sources_get_a_sentence_and_leave_nothing(
    tmp_path: Path, make: object, options: dict[str, str], says: str
) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        prepare(Options((str(tmp_path / "s"),), **options), tmp_path / "out", workers=1)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_rows_without_the_field_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"line 2 has no field 'text' \(it has: body\)"):
        list(documents(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        list(documents(tmp_path / "b.jsonl"))


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text", 3)
    prepare(Options((str(text),)), tmp_path / "out", workers=1)
    before = (tmp_path / "out" / "train.bin").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        prepare(Options((str(text),)), tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "train.bin").read_bytes() == before
    prepare(Options((str(make_text(tmp_path / "more", 4)),)), tmp_path / "out", workers=1, force=True)
    assert (tmp_path / "out" / "train.bin").read_bytes() != before


def test_a_killed_preparation_leaves_no_corpus_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text", 10)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from thinwire.data.prepare import Options, prepare\n"
        "def slow(phase, done, total):\n"
        "    print('going', flush=True); time.sleep(60)\n"
        "prepare(Options((sys.argv[1],)), Path(sys.argv[2]), workers=1, progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(text), str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    prepare(Options((str(text),)), tmp_path / "out", workers=1)
    assert not list(tmp_path.glob(".out.partial-*"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: (c / "train.bin").write_bytes(b"ab"), "has 2 bytes where its index says"),
        (lambda c: (c / "corpus.json").write_text("{"), "is no JSON"),
        (lambda c: (c / "corpus.json").write_text('{"format": 9}'), "not of format 1"),
        (lambda c: (c / "corpus.json").unlink(), "was not made by"),
        (lambda c: (c / "train.bin").unlink(), "does not exist"),
    ],
)
def test_a_damaged_corpus_gets_a_sentence(tmp_path: Path, damage: object, says: str) -> None:
    prepare(Options((str(make_text(tmp_path / "text", 3)),)), tmp_path / "out", workers=1)
    damage(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        Corpus.open(DataConfig(path=tmp_path / "out"))
