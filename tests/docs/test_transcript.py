"""The transcript of the Hugging Face page, read out of the page and run: make, import, train, export, generate."""

import email
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import thinwire
from thinwire.evaluate.load import load_run
from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

ROOT = Path(__file__).parents[2]
_SECTION = re.compile(r"^## A transcript\n(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _section() -> str:
    found = _SECTION.search((ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def _less_text() -> list[str]:
    """A package of the library instead of all of it: the corpus is made in a second instead of twenty."""
    sources = f"data.sources=['{Path(email.__file__).parent}']"
    return ["--set", sources, "--set", "data.include=['*.py']", "--set", "data.validation_fraction=0.2"]


def _command(words: list[str], folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> str:
    """What one command of the page prints when it runs in `folder`, the current one."""
    program, *rest = words
    if program == "python":
        patch.setattr(sys, "argv", rest)
        runpy.run_path(rest[0], run_name="__main__")
        return capture.readouterr().out
    assert program == "thinwire"
    done = thinwire(*rest, *(_less_text() if rest[0] == "train" else []), cwd=folder, timeout_s=250)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def _play(folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Run all blocks of the section in order: the commands that were typed, and what the Python lines printed.

    Each command must print what the page says that it prints, as far as neither text nor time decide it.
    """
    typed: list[str] = []
    printed = ""
    for kind, text in _BLOCK.findall(_section()):
        if kind == "python":
            exec(text, {})
            printed = capture.readouterr().out
            continue
        for line, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            said = _command(shlex.split(line), folder, patch, capture).splitlines()
            fixed = [row for row in shown.splitlines() if _is_fixed(line, row)]
            assert fixed
            assert [row for row in fixed if row not in [row.rstrip() for row in said]] == []
            typed.append(line)
    return typed, printed


def _is_fixed(line: str, row: str) -> bool:
    """Of training, the tables of states and of bytes sent for them; of other commands, all lines."""
    if line.startswith("thinwire train"):
        return row.startswith("│") and "control" not in row
    return row != "..."


def _assert_as_predicted(log: Path) -> None:
    """The bytes that the ledger counted are those predicted before step 0."""
    predicted = next(read_events(log, "run_start"))["wire_predicted"]
    assert {level: set(purposes) for level, purposes in predicted.items()} == {
        "node": {"P-gather", "G-reduce"},
        "cluster": {"P-refresh", "G-reduce"},
    }
    records = list(steps(log).values())
    for level, purposes in predicted.items():
        for purpose, count in purposes.items():
            assert sum(record["wire"][level].get(purpose, 0) for record in records) == len(records) * count


def test_the_run_file_on_the_page_is_part_of_the_one_that_is_run() -> None:
    shown = re.search(r"^```toml\n(.*?)^```$", _section(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    whole = tomllib.loads((ROOT / "examples" / "tiny-llama.toml").read_text(encoding="utf-8"))
    for section, keys in tomllib.loads(shown[1]).items():
        assert keys == {key: whole[section][key] for key in keys}


@pytest.mark.slow
def test_the_transcript_runs_and_transformers_has_the_logits_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    typed, printed = _play(tmp_path, monkeypatch, capsys)
    assert [" ".join(line.split()[:2]) for line in typed] == [
        "python examples/tiny_llama.py", "thinwire import", "thinwire train", "thinwire export",
    ]  # fmt: skip
    log = tmp_path / "runs" / "tiny-llama" / EVENTS_FILE
    losses = [record["loss"] for record in steps(log).values()]
    assert len(losses) == 50
    assert losses[-1] < losses[0] - 1
    _assert_as_predicted(log)

    run = load_run(tmp_path / "runs" / "tiny-llama")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama-trained", attn_implementation="eager").eval()
    ids = torch.randint(0, run.spec.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(export(ids).logits, run.model(ids), atol=1e-5, rtol=1e-5)
    assert printed.startswith("class Stack:")
    assert len(printed.strip()) > len("class Stack:")
