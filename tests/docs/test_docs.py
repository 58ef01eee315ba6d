"""Every command and every TOML block of the documentation is executed or validated; the site builds without warnings."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from runs import make_text, thinwire
from test_house import DOING, RANKS, THINKING
from thinwire.cli import app
from thinwire.config import build
from thinwire.lab.config import LabConfig
from thinwire.train.config import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACEHOLDERS = {"RUN.toml": "run.toml", "RUN": "runs/run", "SOURCE...": "text.txt", "DIR": "folder", "INIT": "init"}


def _blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, match in enumerate(_FENCE.finditer(page.read_text(encoding="utf-8"))):
            if match[1] == language:
                yield pytest.param(match[2], id=f"{page.relative_to(ROOT)}-{number}")


def _lines() -> list[str]:
    """Lines of code blocks, fenced without a language or indented, that begin with a program's name."""
    out: list[str] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [line for match in _FENCE.finditer(text) if match[1] in ("", "sh") for line in match[2].splitlines()]
        indented = [line[4:] for line in _FENCE.sub("", text).splitlines() if line.startswith("    ")]
        out += [line.partition(" # ")[0].partition(" | ")[0].strip() for line in fenced + indented]
    return sorted({line for line in out if line})


LINES = _lines()
COMMANDS = [line for line in LINES if line.startswith("thinwire ")]
EXECUTED = [line for line in COMMANDS if line.startswith(("thinwire plan examples", "thinwire simulate examples"))]


@pytest.mark.parametrize("text", list(_blocks("toml")))
def test_a_toml_block_is_a_valid_run_file_or_lab_file(text: str) -> None:
    tree = tomllib.loads(text)
    if "hosts" in tree:
        build(LabConfig, tree, "the block")
        return
    config = build(RunConfig, {**tree, "data": {"path": "corpus", **tree.get("data", {})}}, "the block")
    if "plan" in tree and "cluster" in tree:
        config.plan.resolve(config.cluster.resolve(), micro_batch=1, accumulate=1)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_only_arguments_that_exist(line: str) -> None:
    words = [_PLACEHOLDERS.get(word, word) for word in shlex.split(line.replace("[--set ...]", "--set run.steps=1"))][
        1:
    ]
    choice = [word.split("|")[0] for word in words]
    group = typer.main.get_command(app)
    name, command, rest = choice[0], group, choice
    context = click.Context(group)  # type: ignore[arg-type]
    while hasattr(command, "get_command"):
        name, *rest = rest
        found = command.get_command(context, name)
        assert found is not None, f"no such command: {name}"
        command = found
    command.make_context(name, list(rest))


@pytest.mark.slow
@pytest.mark.parametrize("line", EXECUTED)
def test_a_planning_command_runs(line: str, tmp_path: Path) -> None:
    words = [str(tmp_path / w) if w.endswith(".json") else w for w in shlex.split(line)][1:]
    done = subprocess.run(
        [sys.executable, "-m", "thinwire", *words], cwd=ROOT, check=False, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_commands_of_the_first_page_train_score_and_write(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "index.md").read_text()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    small = ["--set", "run.steps=4", "--set", "schedule.warmup_steps=1"]
    texts = make_text(tmp_path / "texts", documents=100)
    for line in (
        "thinwire train examples/stdlib.toml",
        "thinwire eval runs/stdlib",
        "thinwire generate runs/stdlib --prompt",
    ):
        assert line in page
    own = [f"--set=data.sources=['{texts}']", "--set=data.tokenizer=bytes", "--set=data.validation_fraction=0.3"]
    said = []
    for words in (
        ["train", "examples/stdlib.toml", *small, *own, "--set=model.preset=llama-1m"],
        ["eval", "runs/stdlib"],
        ["generate", "runs/stdlib", "--prompt", "class Stack:"],
    ):
        done = thinwire(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        said.append(done.stdout)
    assert "4 of 4" in said[0] and "bits per byte" in said[1] and said[2].startswith("class Stack:")


def test_other_lines_name_files_and_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for line in LINES:
        words = line.split()
        if words[0] == "make":
            assert words[1] in targets, line
        for extra in re.findall(r"thinwire\[(\w+)\]", line):
            assert extra in extras, line
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in re.findall(r"\b((?:examples|benchmarks)/[\w./-]+\.(?:toml|py|md))\b", text):
        assert (ROOT / name).is_file() or (ROOT / "docs" / name).is_file(), name


HOUSE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_files_that_the_architecture_page_names_exist() -> None:
    """Modules and folders are named by their way from `src/thinwire/`, tests from the root."""
    named = [name for name in re.findall(r"`([\w/.]+)`", HOUSE) if "/" in name or name.endswith(".py")]
    paths = [name for name in named if name != "tests/ROOM/"]
    assert len(paths) > 20
    assert [
        name for name in paths if not any((base / name).exists() for base in (ROOT / "src" / "thinwire", ROOT))
    ] == []


def test_the_architecture_pages_table_has_every_room_with_its_rank_and_wing() -> None:
    wing, found = "", {}
    for line in HOUSE.splitlines():
        ranks, rooms, *_ = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else ["", ""]
        if not ranks and rooms.startswith("*"):
            wing = rooms.strip("*").partition(",")[0]
        elif ranks[:1].isdecimal():
            first, _, last = ranks.partition("-")
            for room in re.findall(r"`(\w+)(?:/|\.py)`", rooms):
                found[room] = (wing, range(int(first), int(last or first) + 1))
    assert found.keys() == RANKS.keys()
    assert [room for room, (_, ranks) in found.items() if RANKS[room] not in ranks] == []
    assert {room for room, (wing, _) in found.items() if wing == "doing"} == DOING
    assert {room for room, (wing, _) in found.items() if wing == "thinking"} == THINKING


def _sentences() -> str:
    """All text of the source, constants joined, so that a piece of a message can be looked for."""
    parts: list[str] = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_every_message_of_the_troubleshooting_page_is_one_that_the_program_says() -> None:
    said = _sentences()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10
    assert [message for message in messages if message not in said] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'thinwire[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    reference = (tmp_path / "reference.html").read_text()
    assert "plan.compression" in reference and "Path | None" in reference and "\\|" not in reference
    assert "ShardedOptimizer" in (tmp_path / "library.html").read_text()
