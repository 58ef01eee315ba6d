"""The command line: quick without torch, one sentence and status 2 for wrong input, nothing half-written."""

import itertools
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runs import command, ended, environment, make_corpus, make_text, thinwire, warm, write_run
from thinwire.cli import main
from thinwire.model.presets import preset_names
from thinwire.train.launch import free_port


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), tokenizer="bpe:300")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run."""
    folder = tmp_path_factory.mktemp("done")
    done = thinwire("train", write_run(folder, corpus, run={"steps": 8, "sample_tokens": 10}))
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    assert done.stdout.splitlines()[0].startswith("device: cpu")
    assert "sample" in done.stdout
    return folder / "run"


def test_a_run_says_what_it_will_send_how_it_goes_and_what_it_sent(corpus: Path, tmp_path: Path) -> None:
    run = write_run(
        tmp_path, corpus, cluster={"levels": [2]}, run={"steps": 2, "log_every": 1}, schedule={"warmup_steps": 1}
    )
    done = thinwire("train", run)
    assert done.returncode == 0, done.stderr
    plan, measured = _table(done.stdout, "plan ("), _table(done.stdout, "bytes sent by rank 0")
    assert plan[0] == ["what", "where", "bytes on rank 0"]
    assert [row[0] for row in plan[1:4]] == ["params", "grads", "optimizer"]
    assert measured[0] == ["level", "purpose", "predicted", "measured"]
    predicted = {purpose: (said, counted) for _, purpose, said, counted in measured[1:] if said != "-"}
    assert predicted and all(said == counted for said, counted in predicted.values()), measured
    assert {row[0].removesuffix(" a step") for row in plan[4:]} == predicted.keys()
    progress = r"^step (\d)/2  loss \d\.\d{4}  \S+.* tokens/s  MFU \d+\.\d%  exposed comm \d+\.\d%  ETA .*\d"
    assert re.findall(progress, done.stdout, re.MULTILINE) == ["1", "2"]
    assert re.findall(r"^validation at step (\d): .* bits per byte", done.stdout, re.MULTILINE) == ["0", "2"]


def _table(text: str, title: str) -> list[list[str]]:
    """The rows of the table whose title begins so, its header first."""
    rows = itertools.dropwhile(lambda line: not line.startswith("┏"), text[text.index(f"\n{title}") :].splitlines())
    rows = itertools.takewhile(lambda line: line[:1] in tuple("┏┃┡├│"), rows)
    return [[cell.strip() for cell in re.split("[┃│]", row)[1:-1]] for row in rows if row[0] in "┃│"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["data", "prepare", "--help"]])
def test_help_answers_without_torch(arguments: list[str]) -> None:
    code = (
        f"import sys, contextlib\nfrom thinwire.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments!r})\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "thinwire" in done.stdout


def test_every_verb_shows_a_worked_example() -> None:
    for verb in (
        ["train"],
        ["data", "prepare"],
        ["data", "show"],
        ["data", "chat"],
        ["launch", "slurm"],
        ["launch", "k8s"],
        ["eval"],
        ["generate"],
        ["export"],
        ["import"],
    ):
        assert "Example: thinwire" in " ".join(thinwire(*verb, "--help").stdout.split()), verb


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["optimizer.lrr=1"], "did you mean 'lr'"),
        (["data.path=nowhere"], "there is no corpus at nowhere"),
        (["batch.sequences=15", "cluster.levels=[2]"], "batch.sequences = 15 is not divisible by 2 ranks"),
        (["batch.micro_batch=3"], "micro_batch = 3 does not divide"),
        (["batch.tokens=65"], "batch.tokens = 65 is longer than the model's 64 positions"),
        (["batch.tokens=1000000", "model.max_tokens=1000000"], "fewer than one sequence"),
        (["model.vocab_size=10"], "smaller than the tokenizer's 300"),
        (["model.preset=llama-9m"], "there is no model preset 'llama-9m'; did you mean"),
        (["optimizer.lr=-1"], "greater than 0"),
        (["optimizer.lr=nan"], "finite number"),
        (["schedule.warmup_steps=500"], "leaves nothing"),
        (["run.folder=/proc/nothing/run"], "cannot be written"),
        (["cluster={preset='nope'}"], "there is no cluster preset"),
    ],
)
def test_wrong_settings_get_one_sentence_and_status_2(
    corpus: Path, tmp_path: Path, settings: list[str], says: str
) -> None:
    path = write_run(tmp_path, corpus)
    done = thinwire("train", path, *[argument for setting in settings for argument in ("--set", setting)])
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_taken_port_is_named(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = thinwire("train", write_run(tmp_path, corpus), "--port", str(port))
    assert done.returncode == 2
    assert f"port {port} cannot be used" in done.stderr


def test_a_folder_of_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    done = thinwire("train", path)
    assert done.returncode == 2
    assert "is not empty and holds no run.toml" in done.stderr
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_more_ranks_than_cores_are_warned_about(corpus: Path, tmp_path: Path) -> None:
    import os

    ranks = (os.cpu_count() or 1) + 1
    sections = {
        "cluster": {"levels": [ranks]},
        "batch": {"sequences": ranks, "micro_batch": 1},
        "run": {"steps": 1, "sample_tokens": 0},
    }
    done = thinwire("train", write_run(tmp_path, corpus, schedule={"warmup_steps": 0}, **sections))
    assert done.returncode == 0, done.stderr
    assert f"{ranks} ranks share" in done.stderr


def test_a_corpus_is_prepared_on_first_use(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text")
    path = write_run(
        tmp_path, tmp_path / "new", data={"sources": [str(text)], "tokenizer": "bpe:280"}, run={"steps": 2},
        schedule={"warmup_steps": 1},
    )  # fmt: skip
    done = thinwire("train", path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "corpus.json").exists()


def test_a_plan_that_cannot_be_is_told_before_a_corpus_is_made(tmp_path: Path) -> None:
    path = write_run(
        tmp_path, tmp_path / "new", data={"sources": [str(make_text(tmp_path / "text"))]},
        plan={"sync": {"inner_steps": 4, "delay": 4}},
    )  # fmt: skip
    done = thinwire("train", path)
    assert done.returncode == 2
    assert "delay = 4 must be below inner_steps = 4" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_damaged_corpus_is_named_before_anything_starts(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    raw = (corpus / "train.bin").read_bytes()
    (corpus / "train.bin").write_bytes(raw[:-1])
    done = thinwire("train", write_run(tmp_path, corpus))
    assert done.returncode == 2
    assert "it is damaged" in done.stderr


def test_another_corpus_is_refused_on_resume(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "corpus"
    done = thinwire("data", "prepare", make_text(tmp_path / "text", seed=9), "-o", other, "--tokenizer", "bpe:300")
    assert done.returncode == 0
    again = thinwire("train", finished.parent / "run.toml", "--set", f"data.path={other}", "--set", "run.steps=9")
    assert again.returncode == 2, again.stderr
    assert "was trained on another corpus" in again.stderr


def test_eval_and_generate_read_a_run(finished: Path) -> None:
    scored = thinwire("eval", finished, "--json")
    assert scored.returncode == 0, scored.stderr
    figures = json.loads(scored.stdout)
    assert figures["step"] == 8
    assert 0 < figures["bits_per_byte"] < 8
    texts = [
        thinwire("generate", finished, "--prompt", "def", "--tokens", "12", "--seed", "3").stdout for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("def")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "nowhere"], "is no run folder"),
        (["generate", "nowhere"], "is no run folder"),
        (["generate", "RUN", "--step", "3"], "no checkpoint of step 3; there are: 5, 8"),
        (["generate", "RUN", "--prompt", ""], "the prompt is empty"),
        (["generate", "RUN", "--tokens", "1000"], "do not fit the model's 64 positions"),
        (["generate", "RUN", "--top-p", "0"], "top_p = 0.0 in (0, 1]"),
        (["eval", "RUN", "--data", "nowhere"], "there is no corpus at nowhere"),
        (["data", "show", "nowhere"], "cannot be read"),
        (["data", "prepare", "nowhere", "-o", "x"], "does not exist"),
        (["data", "prepare", "stdlib", "-o", "x", "--validation-fraction", "2"], "must be at least 0 and below 1"),
    ],
)
def test_wrong_arguments_get_one_sentence(finished: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = thinwire(*[str(finished) if argument == "RUN" else argument for argument in arguments], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_finished_run_started_again_says_so_and_changes_nothing(finished: Path) -> None:
    before = sorted(path.name for path in (finished / "checkpoints").iterdir())
    again = thinwire("train", finished.parent / "run.toml")
    assert again.returncode == 0, again.stderr
    assert "8 of 8" in again.stdout
    assert "is finished: 8 of 8 steps are done" in again.stdout
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("more", [[], ["--ranks-per-node=1"]], ids=["a-process-a-rank", "a-process-a-node"])
def test_a_finished_run_says_so_under_a_launcher_too(more: list[str], finished: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    again = ended(warm("train", finished.parent / "run.toml", *more, env={**environment(), **place}))
    assert again.returncode == 0, again.stderr
    assert "is finished: 8 of 8 steps are done" in again.stdout


def test_presets_are_listed_with_their_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["presets"])
    assert left.value.code == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["h200", "989", "TFLOP/s", "131", "GiB", "4.80", "TB/s"] in words
    assert ["three-sites", "h100", "96", "node=8", "at", "3.60"] in [line[:6] for line in words]
    assert ["llama-3-8b", "8.03", "G", "32", "4,096", "128,256", "8,192"] in words
    with pytest.raises(SystemExit):
        main(["presets", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert listed["devices"]["h100"]["peak_flops_per_s"] == 989e12
    assert set(listed["models"]) == set(preset_names())


def _anew(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As a shell does it: warnings are not errors there."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), cwd=folder, check=False
    )


def test_old_names_of_keys_and_options_work_and_a_line_has_the_new_ones(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text")
    done = _anew(tmp_path, "data", "prepare", text, "-o", tmp_path / "corpus", "--heldout-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("thinwire: note: --heldout-fraction is --validation-fraction now; the old name works")
    old = tmp_path / "old.toml"
    old.write_text(
        f'[data]\npath = "{tmp_path / "corpus"}"\n[model]\npreset = "llama-1m"\n[batch]\nsequences = 4\ntokens = 32\n'
        "[cluster]\nlevels = [2]\n[plan]\nwire = { grads = { node = 'int8' } }\n[run]\nsteps = 2\nsample_tokens = 0\n"
    )
    done = _anew(tmp_path, "train", old)
    assert done.returncode == 0, done.stderr
    assert f"note: {old}: plan.wire is plan.compression now; the old name works for one more release" in done.stderr
    assert "[plan.compression" in (tmp_path / "runs" / "old" / "run.toml").read_text()
