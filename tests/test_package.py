"""The package: wheel and sdist build, the wheel works by itself, its types and public names are there, shells complete."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import thinwire
from runs import make_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "thinwire"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "runs", "site")
    )
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def _wheel(folder: Path) -> Path:
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_its_types_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(_wheel(built)) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        stated = wheel.read(metadata).decode()
    source = [path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "thinwire").rglob("*.py")]
    assert sorted(names) == sorted([*source, "thinwire/py.typed"])
    assert f"Version: {thinwire.__version__}" in stated
    assert all(f"Provides-Extra: {extra}" in stated for extra in ("hf", "dev"))


def test_the_sdist_holds_what_a_person_needs_to_build_and_test(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for wanted in ("pyproject.toml", "LICENSE", "README.md", "constraints.txt", "Makefile", "examples/stdlib.toml",
                   "tests/worlds.py", "docs/run-file.md", "src/thinwire/py.typed"):  # fmt: skip
        assert wanted in names, wanted
    assert not any("__pycache__" in name or name.startswith("runs/") for name in names)


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; what it depends on is borrowed from this one, thinwire is not."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index", "--quiet",
               "--disable-pip-version-check", "--ignore-installed", str(_wheel(built))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _outside(folder: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run in an empty folder, without this checkout on the path."""
    here = folder / "empty"
    here.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=here, env=environment,
                          timeout=200, check=False)  # fmt: skip


def test_the_installed_wheel_is_what_answers(environment: Path) -> None:
    where = _outside(environment, environment / "bin" / "python", "-c", "import thinwire; print(thinwire.__file__)")
    assert where.stdout.startswith(str(environment)), where
    said = _outside(environment, environment / "bin" / "thinwire", "--version")
    assert said.stdout == f"thinwire {thinwire.__version__}\n", said.stderr


@pytest.mark.slow
def test_the_installed_wheel_trains(environment: Path, tmp_path: Path) -> None:
    text = make_text(tmp_path / "text", documents=400)
    settings = [f'data.sources=["{text}"]', f"data.path={tmp_path / 'corpus'}", "data.tokenizer=bytes", "run.steps=2",
                "schedule.warmup_steps=0", "run.sample_tokens=0", "run.eval_sequences=2", "model={preset='llama-1m'}",
                "batch={sequences=4, tokens=32, micro_batch=1}", f"run.folder={tmp_path / 'run'}"]  # fmt: skip
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = _outside(
        environment, environment / "bin" / "thinwire", "train", ROOT / "examples" / "stdlib.toml", *arguments
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout


@pytest.mark.slow
def test_a_users_code_is_checked_against_our_types(environment: Path, tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text("import thinwire\nfrom thinwire import Plan\nn: str = Plan(levels=(('node', 2),)).accumulate\n")
    python = environment / "bin" / "python"
    done = _outside(environment, python, "-m", "mypy", "--python-executable", python, "--follow-imports=silent", user)
    assert "Incompatible types in assignment" in done.stdout, done.stdout + done.stderr
    assert "py.typed" not in done.stdout


def test_public_names_are_listed_sorted_there_and_documented() -> None:
    assert list(thinwire.__all__) == sorted(thinwire.__all__)
    assert dir(thinwire) == sorted([*thinwire.__all__, "__version__"])
    for name in thinwire.__all__:
        value = getattr(thinwire, name)
        assert inspect.getdoc(value), name
        assert value.__module__.startswith("thinwire."), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = thinwire.nothing


def test_type_checkers_and_the_running_program_see_the_same_names() -> None:
    """The names under TYPE_CHECKING, those in `__all__` and those that `__getattr__` finds are the same."""
    source = (ROOT / "src" / "thinwire" / "__init__.py").read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__ =")]
    lines = [line.strip() for line in block.splitlines() if line.strip().startswith("from ")]
    typed = {}
    for line in lines:
        module, _, names = line.removeprefix("from ").partition(" import ")
        typed |= dict.fromkeys((name.strip() for name in names.split(",")), module)
    assert sorted(typed) == list(thinwire.__all__)
    for name, module in typed.items():
        assert getattr(importlib.import_module(module), name) is getattr(thinwire, name)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_options(shell: str) -> None:
    def complete(words: str, index: int) -> str:
        variables = {"_THINWIRE_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(index),
                     "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}  # fmt: skip
        code = "from thinwire.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                              env={**os.environ, **variables})  # fmt: skip
        return done.stdout

    assert "export" in complete("thinwire ex", 1)
    assert "--precision" in complete("thinwire export --pre", 2)
    assert "train" not in complete("thinwire ex", 1)
