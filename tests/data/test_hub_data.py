"""Data sets of the hub, shown on local folders: the same corpus as from plain files, all of it or none."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from runs import make_text
from talks import talk
from thinwire.cli import main
from thinwire.config import build
from thinwire.data import hub
from thinwire.data.chat import ChatOptions, prepare_chat
from thinwire.data.corpus import Corpus, DataConfig, read_manifest
from thinwire.data.hub import HubSource, open_hub, parse
from thinwire.data.prepare import Options, prepare
from thinwire.errors import DataError
from thinwire.train.config import RunConfig
from thinwire.train.job import corpus_for

TEXTS = ["first document\n", "zweites Dokument: äöü €", "third\nwith lines", "x" * 500, "last"]


pytestmark = pytest.mark.filterwarnings(  # the library's reader of CSV leaves its file to the garbage collector
    r"ignore:Exception ignored in. <_io.FileIO name='.*train.csv':pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No way to the hub, in this process and below it, and an empty cache; what is left open is found in this file."""
    home = tmp_path_factory.mktemp("home")
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    yield home
    gc.collect()


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_set(folder: Path, kind: str, column: str = "text") -> str:
    """A data set of TEXTS and a number each, in two files where the kind allows; returns its source."""
    rows = [{column: text, "n": i} for i, text in enumerate(TEXTS)]
    table = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        write_jsonl(folder / "train-0.jsonl", rows[:2])
        write_jsonl(folder / "train-1.jsonl", rows[2:])
    elif kind == "parquet":
        folder.mkdir()
        table.select(range(2)).to_parquet(folder / "train-0.parquet")
        table.select(range(2, 5)).to_parquet(folder / "train-1.parquet")
    elif kind == "csv":
        folder.mkdir()
        table.to_csv(folder / "train.csv")
    elif kind == "saved":
        table.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(folder)
    return f"hf:{folder}"


def corpus_of(source: str, out: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    """The digest and the manifest of a corpus made from `source`."""
    manifest = prepare(Options((source,), **{"heldout_fraction": 0.3, **options}), out, workers=1)
    return Corpus.open(DataConfig(path=out)).digest, manifest


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "saved", "saved with splits"])
def test_a_data_set_gives_the_same_corpus_as_its_texts_in_plain_files(tmp_path: Path, kind: str) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS])
    expected, _ = corpus_of(str(plain), tmp_path / "plain", tokenizer="bpe:270")
    source = make_set(tmp_path / "set", kind)
    found, manifest = corpus_of(source, tmp_path / "out", tokenizer="bpe:270")
    assert found == expected
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["heldout"]["documents"] == len(TEXTS)
    (known,) = manifest["hub"]
    assert (known["source"], known["split"], known["column"]) == (source, "train", "text")
    assert known["fingerprint"]
    assert (
        known["reader"] == f"{'json' if kind == 'jsonl' else kind.partition(' ')[0]} of datasets {datasets.__version__}"
    )
    again, its_manifest = corpus_of(source, tmp_path / "again", tokenizer="bpe:270")
    assert (again, its_manifest) == (found, manifest)


def test_only_the_prepared_corpus_is_written(tmp_path: Path, offline: Path) -> None:
    before = sorted(Path(make_set(tmp_path / "set", "parquet")[3:]).rglob("*"))
    corpus_of(f"hf:{tmp_path / 'set'}", tmp_path / "out")
    assert sorted((tmp_path / "set").rglob("*")) == before
    assert sum(path.stat().st_size for path in offline.rglob("*") if path.is_file()) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_configs_and_splits_are_chosen(tmp_path: Path) -> None:
    for config in ("de", "fr"):
        for split in ("train", "validation"):
            write_jsonl(tmp_path / "set" / config / f"{split}.jsonl", [{"text": f"{config} {split}"}])
    listed = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("de", "fr"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    source = f"hf:{tmp_path / 'set'}"
    assert [text for text, _ in open_hub(f"{source}:fr").texts("text")] == ["fr train"]
    rows = open_hub(f"{source}:de:validation")
    assert [text for text, _ in rows.texts("text")] == ["de validation"]
    assert rows.identity["config"] == "de"
    with pytest.raises(DataError, match=r"has no config 'it'; it has: de, fr$"):
        open_hub(f"{source}:it")
    with pytest.raises(DataError, match=r"has several configs, and none is its default; it has: de, fr$"):
        open_hub(source)
    with pytest.raises(DataError, match=r"has no split 'test'; it has: train, validation$"):
        open_hub(f"{source}:de:test")


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("hf:owner/name", HubSource("owner/name")),
        ("hf:owner/name:de", HubSource("owner/name", config="de")),
        ("hf:owner/name:de:test", HubSource("owner/name", config="de", split="test")),
        ("hf:owner/name::test", HubSource("owner/name", split="test")),
        ("hf:name@refs/pr/1:de", HubSource("name", "refs/pr/1", "de")),
    ],
)
def test_a_source_is_read_in_parts(written: str, parts: HubSource) -> None:
    assert parse(written) == parts


@pytest.mark.parametrize("written", ["hf:", "hf:@main", "hf:name@", "hf:name:", "hf:name:de:", "hf:name:de:test:x"])
def test_a_malformed_source_is_answered_with_the_form(written: str) -> None:
    with pytest.raises(DataError, match=r"is not of the form hf:NAME"):
        parse(written)


def test_the_column_is_the_named_one_or_the_only_text(tmp_path: Path) -> None:
    source = make_set(tmp_path / "one", "parquet", column="body")
    expected, _ = corpus_of(make_set(tmp_path / "plain", "parquet"), tmp_path / "a")
    assert corpus_of(source, tmp_path / "b")[0] == expected
    assert corpus_of(source, tmp_path / "c", field="body")[1]["hub"][0]["column"] == "body"
    for kind, names in (("jsonl", "title, body, n"), ("parquet", "title, body, n")):
        rows = [{"title": "t", "body": text, "n": 1} for text in TEXTS]
        folder = tmp_path / kind
        write_jsonl(folder / "a.jsonl", rows)
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
            (folder / "a.jsonl").unlink()
        with pytest.raises(DataError, match=rf"has no column 'text' \(it has: {names}\); name the column with --field"):
            corpus_of(f"hf:{folder}", tmp_path / "out")
        assert corpus_of(f"hf:{folder}", tmp_path / f"{kind}-out", field="body")[0] == expected
        with pytest.raises(DataError, match="has no column 'bodi'"):
            corpus_of(f"hf:{folder}", tmp_path / "out", field="bodi")
        with pytest.raises(DataError, match="row 1: the field 'n' is int, not text"):
            corpus_of(f"hf:{folder}", tmp_path / "out", field="n")
        assert not list(tmp_path.glob("*out.partial*")) and not (tmp_path / "out").exists()


def _empty(folder: Path, *, saved: bool) -> str:
    none = datasets.Dataset.from_dict({"text": []}, datasets.Features({"text": datasets.Value("string")}))
    if saved:
        none.save_to_disk(folder)
    else:
        folder.mkdir()
        none.to_parquet(folder / "train.parquet")
    return f"hf:{folder}"


def _damaged(folder: Path) -> str:
    make_set(folder, "jsonl")
    with (folder / "train-1.jsonl").open("a") as file:
        file.write('{"text": \n')
    return f"hf:{folder}"


def _file(folder: Path) -> str:
    return f"hf:{write_jsonl(folder, [{'text': 'a'}])}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: _empty(f, saved=True), "has no rows; nothing to train on"),
        (lambda f: _empty(f, saved=False), "has no rows; nothing to train on"),
        (_damaged, "cannot be read"),
        (_file, "is a file; give it without hf:"),
        (lambda f: f.mkdir() or f"hf:{f}", "cannot be read"),
        (lambda f: f"hf:{f}", "cannot be read: Couldn't find any data file"),
        (lambda f: make_set(f, "jsonl") + "@main", "which has no revisions"),
        (lambda f: make_set(f, "jsonl") + ":de", "has no config 'de'; it has: default"),
        (lambda f: make_set(f, "jsonl") + "::test", "has no split 'test'; it has: train"),
        (lambda f: make_set(f, "saved") + ":de", "has no configs"),
        (lambda f: make_set(f, "saved") + "::test", "has no split 'test'; it has: train"),
        (lambda f: make_set(f, "saved with splits") + "::test", "has no split 'test'; it has: train, validation"),
        (lambda f: "hf:someone/something", "without network give a folder of this machine"),
        (lambda f: "hf:someone/something@0123abc:de:test", "without network give a folder of this machine"),
        (lambda f: "hf:a:b:c:d", "is not of the form"),
    ],
)
def test_wrong_sources_get_one_sentence_and_status_2_and_leave_nothing(
    tmp_path: Path, make: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "set")
    with pytest.raises(SystemExit) as end:
        main(["data", "prepare", source, "-o", str(tmp_path / "out"), "--workers", "1"])
    assert end.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("thinwire")]
    assert len(said) == 1 and says in said[0]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_without_network_the_librarys_own_copy_is_read_if_it_is_of_the_pinned_revision(
    tmp_path: Path, offline: Path
) -> None:
    make_set(tmp_path / "something", "parquet")
    builder = datasets.load_dataset_builder(str(tmp_path / "something"))
    builder.download_and_prepare(offline / "datasets" / "someone___something" / "default" / "0.0.0" / "0123abc")
    for source in ("hf:someone/something", "hf:someone/something@0123abc"):
        rows = open_hub(source)
        assert rows.identity["revision"] == "0123abc"
        assert [text for text, _ in rows.texts("text")] == TEXTS
        assert rows.identity["reader"] == f"cache of datasets {datasets.__version__}"
    with pytest.raises(DataError, match="cached copy is of revision 0123abc, not 4567def; try again with network"):
        open_hub("hf:someone/something@4567def")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets library; pip install 'thinwire\[hf\]'"):
        corpus_of(f"hf:{tmp_path}", tmp_path / "out")


def test_an_error_in_the_middle_leaves_nothing_and_the_next_try_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_set(tmp_path / "set", "parquet")
    expected, _ = corpus_of(source, tmp_path / "whole")
    reading = hub.HubRows.rows

    def breaking(self: hub.HubRows, column: str, start: Any = None) -> Any:
        for number, row in enumerate(reading(self, column, start)):
            with hub._as_data_errors(self.written):
                if number == 3:
                    raise ConnectionError("the connection was closed")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(hub.HubRows, "rows", breaking)
        with pytest.raises(DataError, match="the connection was closed"):
            corpus_of(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]
    assert corpus_of(source, tmp_path / "out")[0] == expected


def _long_set(folder: Path, kind: str) -> str:
    """40 documents of some hundred characters, in four files where the kind allows."""
    texts = [path.read_text() for path in sorted(make_text(folder.with_name("text"), 40).iterdir())]
    for part in range(4):
        rows = [{"n": i, "text": text} for i, text in enumerate(texts[10 * part : 10 * part + 10])]
        folder.mkdir(exist_ok=True)
        if kind == "jsonl":
            write_jsonl(folder / f"train-{part}.jsonl", rows)
        elif kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"train-{part}.parquet", batch_size=4)
    if kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
    return f"hf:{folder}"


class Reading:
    """Counts the rows that come through `HubRows.rows`, and breaks the connection after so many."""

    def __init__(self, patch: pytest.MonkeyPatch, breaks_after: int | None = None) -> None:
        self.rows, self._breaks_after, self._real = 0, breaks_after, hub.HubRows.rows
        reading = self
        patch.setattr(hub.HubRows, "rows", lambda rows, column, start=None: reading._read(rows, column, start))

    def _read(self, rows: hub.HubRows, column: str, start: Any) -> Iterator[Any]:
        for row in self._real(rows, column, start):
            if self.rows == self._breaks_after:
                raise DataError("the connection was closed")
            self.rows += 1
            yield row


@pytest.mark.parametrize(
    ("kind", "workers", "tokenizer_"), [("jsonl", 1, "bytes"), ("parquet", 2, "bpe:270"), ("saved", 1, "bytes")]
)
def test_a_preparation_that_broke_goes_on_where_it_was_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int, tokenizer_: str
) -> None:
    monkeypatch.setattr("thinwire.data.prepare._CHUNK_CHARS", 1)  # each document a chunk, a note every eighth
    source, passes = _long_set(tmp_path / "set", kind), 2 if tokenizer_.startswith("bpe") else 1
    options = Options((source,), tokenizer_, heldout_fraction=0.3)
    expected = prepare(options, tmp_path / "whole", workers=workers)
    with monkeypatch.context() as patch:
        Reading(patch, breaks_after=40 * (passes - 1) + 30)
        with pytest.raises(DataError, match="the connection was closed"):
            prepare(options, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with monkeypatch.context() as patch:
        second = Reading(patch)
        assert prepare(options, tmp_path / "out", workers=workers) == expected
    assert second.rows == 16 if workers == 1 else second.rows in (16, 24, 32)  # chunks under way were not noted yet
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("change", ["options", "rows", "a lost file", "the reader"])
def test_what_was_begun_otherwise_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr("thinwire.data.prepare._CHUNK_CHARS", 1)
    source = _long_set(tmp_path / "set", "jsonl")
    with monkeypatch.context() as patch:
        Reading(patch, breaks_after=30)
        with pytest.raises(DataError, match="the connection was closed"):
            corpus_of(source, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.partial-*")
    if change == "rows":
        write_jsonl(tmp_path / "set" / "train-0.jsonl", [{"n": 0, "text": "other text"}] * 10)
    elif change == "the reader":
        monkeypatch.setattr("datasets.__version__", "9.9")
    elif change == "a lost file":
        (partial / "train.bin").write_bytes(b"")
    options = {"heldout_fraction": 0.5 if change == "options" else 0.3}
    with monkeypatch.context() as patch:
        second = Reading(patch)
        found, _ = corpus_of(source, tmp_path / "out", **options)
    assert second.rows == 40
    assert found == corpus_of(source, tmp_path / "whole", **options)[0]
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_preparation_is_not_taken_for_whole_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _long_set(tmp_path / "set", "jsonl")
    expected, _ = corpus_of(source, tmp_path / "whole")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from thinwire.data import prepare as module\n"
        "from thinwire.data.prepare import Options, prepare\n"
        "module._CHUNK_CHARS = 1\n"
        "calls = []\n"
        "def slow(phase, done, total):\n"
        "    calls.append(done)\n"
        "    if len(calls) == 20:\n"
        "        print('going', flush=True); time.sleep(60)\n"
        "prepare(Options((sys.argv[1],), heldout_fraction=0.3), Path(sys.argv[2]), workers=1, progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, source, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"going\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with pytest.raises(DataError, match="there is no corpus"):
        Corpus.open(DataConfig(path=tmp_path / "out"))
    second = Reading(monkeypatch)
    assert corpus_of(source, tmp_path / "out")[0] == expected
    assert second.rows == 24
    assert not list(tmp_path.glob(".out.partial-*"))


def test_a_run_file_prepares_from_a_data_set_and_show_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_set(tmp_path / "set", "saved with splits", column="body")
    data = {"path": str(tmp_path / "corpus"), "sources": [f"{source}::train"], "field": "body"}
    corpus_for(build(RunConfig, {"data": data}, "the run file"))
    assert read_manifest(tmp_path / "corpus")["sources"] == [f"{source}::train"]
    with pytest.raises(SystemExit) as end:
        main(["data", "show", str(tmp_path / "corpus")])
    assert end.value.code == 0
    assert f"from {source}::train, column body, version " in capsys.readouterr().out


def test_conversations_are_read_as_from_json_lines(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"messages": talk([("user", "def?"), ("assistant", f"class {i}")]), "n": i} for i in range(4)]
    rows[0]["messages"][0]["name"] = "someone"  # a key that only one message has
    file = write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    digests = []
    for name, source in (("from file", str(file)), ("from set", f"hf:{tmp_path / 'set'}")):
        prepare_chat(ChatOptions((source,), tokenizer, heldout_fraction=0.0), tmp_path / name)
        digests.append(Corpus.open(DataConfig(path=tmp_path / name)).digest)
    assert digests[0] == digests[1]
    with pytest.raises(DataError, match=r"has no column 'talks' \(it has: messages, n\)"):
        prepare_chat(ChatOptions((f"hf:{tmp_path / 'set'}",), tokenizer, field="talks"), tmp_path / "out")
