"""Whatever is wrong with what a user gives: status 2, one sentence of ours, nothing written. A table, in one process."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from runs import here, make_corpus, thinwire, write_run
from thinwire.config import read_toml
from thinwire.model.presets import preset

FOREIGN = re.compile(
    r"Traceback|Errno|pydantic|[Ii]nput should|validation error|Usage:|Invalid value|Expecting|codec can't|Error\b"
)
LONG = "n" * 300
LEVEL = '{name="node",fanout=8,bytes_per_s=1e11,latency_s=1e-6}'
SLOW = "plan plan.toml --set cluster={device='h100',levels=[{name='n',fanout=8,bytes_per_s=%s}]}"


def named(value: str | list[str]) -> str:
    """Of a row in the table."""
    return value if isinstance(value, str) else value[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a finished run, a file to plan with, a cluster file, a lab and a plan."""
    folder = tmp_path_factory.mktemp("world")
    corpus = make_corpus(folder, tokenizer="bpe:300")
    done = thinwire("train", write_run(folder, corpus, run={"steps": 2}, schedule={"warmup_steps": 1}))
    assert done.returncode == 0, done.stderr
    planned = {
        "model": {"preset": "llama-1m"},
        "batch": {"sequences": 64, "tokens": 128},
        "cluster": {"preset": "dgx-a100-4"},
    }
    (folder / "plan.toml").write_text(tomli_w.dumps(planned))
    (folder / "lab.toml").write_text("hosts = 2\n")
    (folder / "talks.jsonl").write_text('{"messages": []}\n')
    return folder


@pytest.fixture(autouse=True)
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("wrong input started ranks")

    for verb in ("train", "probe"):
        monkeypatch.setattr(f"thinwire.cli.{verb}.launch", refuse)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def refused(world: Path, *arguments: str) -> str:
    """The one sentence with which the command line refuses `arguments`."""
    before = files(world)
    done = here([argument.replace("WORLD", str(world)) for argument in arguments], world)
    assert done.returncode == 2, (done.returncode, done.stderr, done.stdout[-300:])
    assert done.stderr.startswith("thinwire: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 1000, done.stderr
    assert not FOREIGN.search(done.stderr), done.stderr
    assert files(world) == before
    return done.stderr


READERS = [
    ["train", "PATH"],
    ["plan", "PATH"],
    ["simulate", "PATH"],
    ["train", "run.toml", "--plan", "PATH"],
    ["report", "PATH"],
    ["report", "run", "--cluster", "PATH"],
    ["eval", "PATH"],
    ["eval", "run", "--data", "PATH"],
    ["generate", "PATH"],
    ["export", "PATH", "-o", "x"],
    ["data", "show", "PATH"],
    ["lab", "show", "PATH"],
    ["launch", "slurm", "PATH"],
    ["lab", "run", "PATH", "--", "true"],
    ["lab", "run", "lab.toml", "--train", "PATH"],
    ["launch", "k8s", "PATH", "--image", "i"],
    ["train", "run.toml", "--set", "data.path='PATH'"],
    ["train", "run.toml", "--set", "cluster={file='PATH'}"],
    ["plan", "plan.toml", "--set", "plan.file='PATH'"],
]


@pytest.mark.parametrize(
    "path", [LONG, "text", "no/such", "run.toml/x", "caf\udce9"], ids=["long", "folder", "none", "under", "bytes"]
)
@pytest.mark.parametrize("arguments", READERS, ids=lambda words: "-".join(words)[:50])
def test_a_path_that_cannot_be_read(world: Path, arguments: list[str], path: str) -> None:
    refused(world, *[word.replace("PATH", path) for word in arguments])


@pytest.mark.parametrize(
    "path",
    [f"{LONG}/x", "text", "no/such/x", "run.toml/x", "/proc/no"],
    ids=["long", "folder", "none", "under", "proc"],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "plan.toml", "--runnable", "-o"],
        ["simulate", "plan.toml", "--trace"],
        ["report", "run", "-o"],
        ["probe", "-o"],
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_written(world: Path, arguments: list[str], path: str) -> None:
    assert "cannot be written" in refused(world, *arguments, path)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run.toml", ["train", "run.toml"]),
        ("plan.toml", ["plan", "plan.toml"]),
        ("lab.toml", ["lab", "show", "lab.toml"]),
        ("corpus.json", ["data", "show", "corpus"]),
        ("corpus.json", ["train", "run.toml"]),
        ("plan.json", ["report", "run"]),
        ("events.jsonl", ["report", "run"]),
        ("manifest.json", ["eval", "run"]),
        ("train.idx", ["train", "run.toml"]),
    ],
)
def test_a_file_without_permission(
    world: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    """Root may read anything: the system's refusal is put in its place."""
    real = io.open

    def forbidding(file: Any, *more: Any, **named: Any) -> Any:
        if isinstance(file, str | Path) and Path(file).name == name:
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *more, **named)

    monkeypatch.setattr("io.open", forbidding)
    sentence = refused(world, *arguments)
    assert name in sentence and "Permission denied" in sentence


TOML = {
    "deep": "a = " + "[" * 5000 + "]" * 5000,
    "tables": "a = " + "{b = " * 3000 + "1" + "}" * 3000,
    "dotted": ".".join("a" * 3000) + " = 1",
    "digits": "[batch]\nsequences = " + "9" * 5000,
    "latin": b'[data]\npath = "caf\xe9"',
    "nul": b"\0\0",
    "binary": bytes(range(256)),
    "utf-16": "[data]".encode("utf-16"),
    "scalar": "batch = 3",
    "list": "batch = [1]",
    "date": "[batch]\nsequences = 2020-01-01",
    "newline": '"a\\nb" = 1',
    "long": "k" * 3000 + " = 1",
}


@pytest.mark.parametrize(
    "verb", [["train"], ["plan"], ["lab", "show"], ["report", "run", "--cluster"]], ids=lambda verb: verb[0]
)
@pytest.mark.parametrize("kind", TOML)
def test_toml_that_is_none(world: Path, tmp_path: Path, kind: str, verb: list[str]) -> None:
    text = TOML[kind]
    (tmp_path / "bad.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert len(refused(world, *verb, str(tmp_path / "bad.toml"))) < 600


def test_an_endless_file_is_no_run_file(world: Path) -> None:
    assert "larger than 16 MiB" in refused(world, "train", "/dev/zero")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfhosts = 3\n")
    assert read_toml(tmp_path / "a.toml") == {"hosts": 3}


JSON = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "digits": '{"format": 1, "a": ' + "9" * 5000 + "}",
    "latin": b'{"a": "\xe9"}',
    "empty": "",
    "null": "null",
    "list": "[]",
    "number": "3",
    "object": "{}",
    "format": '{"format": 1}',
    "nul": b"\0" * 50,
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("corpus/corpus.json", ["train", "run.toml"]),
        ("corpus/corpus.json", ["data", "show", "corpus"]),
        ("run/plan.json", ["report", "run"]),
        ("run/cluster.json", ["report", "run"]),
        ("run/trace.json", ["report", "run"]),
        ("run/checkpoints/step-00000002/manifest.json", ["eval", "run"]),
        ("run/plan.json", ["train", "run.toml", "--plan", "run/plan.json"]),
    ],
    ids=named,
)
@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_none(world: Path, kind: str, name: str, arguments: list[str]) -> None:
    text = JSON[kind]
    with Changed(world / name, lambda raw: text if isinstance(text, bytes) else text.encode()):
        refused(world, *arguments)


@pytest.mark.parametrize("field", ["", "format", "spec", "files", "model_type"])
def test_an_init_folder_whose_document_lacks_a_field(world: Path, tmp_path: Path, field: str) -> None:
    tree = {"format": 1, "model_type": "llama", "spec": preset("llama-1m").model_dump(mode="json"), "files": {}}
    tree.pop(field, None)
    (tmp_path / "init.json").write_text(json.dumps(tree) if field else "[" * 100_000)
    assert (field or "too deeply") in refused(world, "train", "run.toml", "--set", f"model={{init='{tmp_path}'}}")


class Changed:
    """A file that holds something else for a while."""

    def __init__(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        self._path, self._change = path, change

    def __enter__(self) -> None:
        self._raw = self._path.read_bytes()
        self._path.write_bytes(self._change(self._raw))

    def __exit__(self, *error: object) -> None:
        self._path.write_bytes(self._raw)


DAMAGE = {"gone": None, "null": "null", "text": '"x"', "negative": "-1", "half": "1.5", "true": "true", "list": "[]"}
FIELDS = [
    ("corpus/corpus.json", "splits.train", ["data", "show", "corpus"]),
    ("corpus/corpus.json", "splits.train.tokens", ["train", "run.toml"]),
    ("corpus/corpus.json", "splits.heldout", ["train", "run.toml"]),
    ("corpus/corpus.json", "splits", ["plan", "run.toml"]),
    ("corpus/corpus.json", "tokenizer", ["eval", "run"]),
    ("corpus/corpus.json", "tokenizer.vocab_size", ["data", "show", "corpus"]),
    ("corpus/corpus.json", "splits.heldout.documents", ["data", "show", "corpus"]),
    ("run/cluster.json", "levels", ["report", "run"]),
    ("run/plan.json", "levels", ["report", "run"]),
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("name", "field", "arguments"), FIELDS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_a_document_of_ours_with_a_field_that_lacks_or_is_wrong(
    world: Path, name: str, field: str, arguments: list[str], damage: str
) -> None:
    def spoil(raw: bytes) -> bytes:
        tree = json.loads(raw)
        *above, last = field.split(".")
        node = tree
        for key in above:
            node = node[key]
        if DAMAGE[damage] is None:
            del node[last]
        else:
            node[last] = json.loads(DAMAGE[damage] or "")
        return json.dumps(tree).encode()

    with Changed(world / name, spoil):
        assert field in refused(world, *arguments)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("event", "field"),
    [("run_start", "parameters"), ("step", "wire"), ("step", "seconds"), ("step", "step"), ("eval", "step")],
)
def test_a_record_of_a_run_that_lacks_a_field(world: Path, event: str, field: str, damage: str) -> None:
    def spoil(raw: bytes) -> bytes:
        records = [json.loads(line) for line in raw.splitlines()]
        for record in records:
            if record["event"] == event:
                record.pop(field)
                if DAMAGE[damage] is not None:
                    record[field] = json.loads(DAMAGE[damage] or "")
        return b"".join(json.dumps(record).encode() + b"\n" for record in records)

    with Changed(world / "run" / "events.jsonl", spoil):
        assert field in refused(world, "report", "run")


HUGE = ["1" + "0" * 26, "9" * 5000, "-1", "1.5", "true", "nan", "inf", '"²"', "[]", "{}", "2020-01-01"]
WHOLE = [
    "batch.sequences",
    "batch.tokens",
    "batch.micro_batch",
    "run.steps",
    "run.seed",
    "model.layers",
    "model.vocab_size",
    "plan.sync.inner_steps",
]
REAL = ["optimizer.eps", "run.timeout", "model.rope_theta"]
RATES = ["optimizer.lr", "plan.sync.outer_lr"]  # which may be as small as one likes


@pytest.mark.parametrize("value", HUGE, ids=lambda value: value[:12])
@pytest.mark.parametrize("key", WHOLE)
def test_what_is_no_whole_number_of_a_size_that_can_be(world: Path, key: str, value: str) -> None:
    sentence = refused(world, "train", "run.toml", "--set", f"{key}={value}")
    assert "--set" in sentence or key.rpartition(".")[2] in sentence


@pytest.mark.parametrize("value", ["1e300", "-1", "true", "nan", "inf", "[]", "9" * 5000], ids=lambda value: value[:12])
@pytest.mark.parametrize("key", [*REAL, *RATES])
def test_what_is_no_number_that_can_be(world: Path, key: str, value: str) -> None:
    refused(world, "train", "run.toml", "--set", f"{key}={value}")


@pytest.mark.parametrize("key", REAL)
def test_what_is_too_small_to_divide_by(world: Path, key: str) -> None:
    value = "1e-320"
    refused(world, "train", "run.toml", "--set", f"{key}={value}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train run.toml --set batch.micro_batch=1000000000000", "less than or equal to 1000000000"),
        ("train run.toml --set batch.sequences=100000000000000000", "less than or equal to 1000000000"),
        (
            "train run.toml --set batch.sequences=1000000000 --set batch.micro_batch=999999999",
            "try micro_batch = 500000000",
        ),
        ("train run.toml --set cluster.levels=[100000000000000000000000000]", "less than or equal to 1000000"),
        ("plan plan.toml --set cluster={device='h100',levels=[10000,10000]}", "100,000,000 ranks"),
        (
            "train run.toml --set batch.sequences=1000000 --set batch.micro_batch=1 --set cluster.levels=[1000000]",
            "too many",
        ),
        ("train run.toml --set cluster.levels=[true]", "cluster.levels.0"),
        ("train run.toml --set run.compile=3", "must be true or false"),
        ("train run.toml --set plan.partition=3", "must be a table or text"),
        ("train run.toml --set data.path=", "empty path"),
        ('train run.toml --set data.path="a\\u0000b"', "no UTF-8 text"),
        ("train run.toml --set run.folder=caf\udce9", "no UTF-8 text"),
        ("train run.toml --set run.folder=.", "holds no plan.json"),
        ("train run.toml --set run.steps=3\nx=4", "more than one value"),
        ("train run.toml --port 0", "--port"),
        ("train run.toml --port 65536", "--port"),
        ("train run.toml --port ²", "--port"),
        ("train run.toml --prot 3", "--port"),
        ("train", "RUN.toml"),
        ("train run.toml more", "more"),
        ("pln run.toml", "did you mean 'plan'"),
        ("data prpare x", "'prepare'"),
        ("generate run --temperature nan", "must be at least 0 and finite"),
        ("generate run --temperature -1", "must be at least 0 and finite"),
        ("generate run --temperature inf", "must be at least 0 and finite"),
        ("generate run --top-p nan", "top_p"),
        ("generate run --top-p 1.5", "top_p"),
        ("generate run --seed 99999999999999999999999999", "--seed"),
        ("generate run --tokens 0", "--tokens"),
        ("generate run --prompt caf\udce9", "no UTF-8 text"),
        ("generate run --prompt " + "x" * 1000, "shorten the prompt to at most"),
        ("generate run --tokens 1" + "0" * 26, "--tokens"),
        ("eval run --step -1", "no checkpoint of step -1"),
        ("eval run --batch 0", "--batch"),
        ("simulate plan.toml --mtbf-hours 1e-6", "hardly any checkpoint is reached"),
        ("simulate plan.toml --mtbf-hours 0", "must be above 0"),
        ("simulate plan.toml --mtbf-hours nan", "--mtbf-hours"),
        ("simulate plan.toml --mtbf-hours 1e300", "--mtbf-hours"),
        ("simulate plan.toml --jitter nan", "--jitter"),
        ("simulate plan.toml --slow-rank 0:0:nan", "is not REPLICA:STAGE:FACTOR"),
        ("simulate plan.toml --slow-rank 0:0:²", "is not REPLICA:STAGE:FACTOR"),
        ("simulate plan.toml --slow-level node:inf", "is not LEVEL:FACTOR"),
        ("simulate plan.toml --plan tensor=²", "not a whole number above 0"),
        ("simulate plan.toml --plan tensor=" + "9" * 5000, "not a whole number above 0"),
        ("simulate plan.toml --plan tensor=1000000000000", "not a whole number above 0"),
        ("simulate plan.toml --plan tensor=999999999", "the nearest that does is tensor=4"),
        ("simulate plan.toml --plan pipeline=999999999", "the nearest that does is pipeline=32"),
        ("plan plan.toml --why-not context=1000000007", "not a whole number above 0"),
        ("plan plan.toml --top 51", "--top"),
        (
            f"plan plan.toml --set cluster={{device={{name='h100',memory_bytes=1{'0' * 400}}},levels=[{LEVEL}]}}",
            "not a finite",
        ),
        (SLOW % "'1e300EB/s'", "larger than anything"),
        (SLOW % "1e-320", "smaller than anything"),
        ("probe --levels node=²", "is no level"),
        ("launch slurm run.toml --nodes ²", "no number of nodes"),
        ("launch slurm run.toml --nodes 9999999999", "no number of nodes"),
        ("launch slurm run.toml --array 0\n-3 --set cluster.device=cpu", "line break"),
        ("launch slurm run.toml --nodes 1\n2", "--nodes 1\\n2 is no number of nodes"),
        ("probe --device " + "9" * 5000, "there is no device '999"),
        ("launch slurm run.toml --array ²-3", "does not begin with a number"),
        ("launch slurm run.toml --sbatch partition=gpu\nwrap=true", "line break"),
        ("launch slurm run.toml --time 1:00\n#SBATCH", "line break"),
    ],
    ids=lambda value: value[:60],
)
def test_wrong_words_and_numbers(world: Path, arguments: str, says: str) -> None:
    assert says in refused(world, *arguments.split(" "))


@pytest.mark.parametrize(
    "option", [["--temperature", "1e-300"], ["--temperature", "5e-324"], ["--top-p", "5e-324"], ["--top-p", "1e-300"]]
)
def test_the_smallest_temperature_and_share_mean_the_likeliest_token(world: Path, option: list[str]) -> None:
    texts = [
        here(["generate", "run", "--prompt", "def ", "--tokens", "8", *each], world).stdout
        for each in (["--temperature", "0"], option)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")
