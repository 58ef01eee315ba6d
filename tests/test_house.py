"""The house: rooms import only lower ranks of their wing, nothing goes round, thinking needs no torch, models no network."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "thinwire"
RANKS = {
    "errors": 0, "units": 1, "config": 1, "files": 2,
    "cluster": 3, "model": 3, "data": 3,
    "plan": 4,
    "predict": 5, "comm": 5,
    "planner": 6, "parallel": 6,
    "report": 7, "sync": 7, "checkpoint": 7,
    "hub": 8, "evaluate": 9, "rounds": 5,
    "train": 10, "lab": 10, "probe": 11, "operate": 11, "cli": 12, "__main__": 13,
}  # fmt: skip
THINKING = {"predict", "planner", "report", "lab"}
DOING = {"comm", "parallel", "sync", "checkpoint", "evaluate", "hub", "train", "probe"}
WINGS = {
    ("errors", "units", "config", "files", "cluster", "model", "data", "plan", "rounds"): 8,
    ("predict", "planner", "report"): 10,
    ("comm", "parallel", "sync", "checkpoint", "hub", "evaluate", "train"): 12,
    ("lab", "probe", "operate", "cli", "__main__"): 5,
}
"""Rooms of a wing, and how many modules the longest chain of imports inside it may have: each figure only ever goes down."""
TORCH_FREE = [
    "thinwire.cli", "thinwire.cli.train", "thinwire.cli.data", "thinwire.train.config", "thinwire.train.job",
    "thinwire.checkpoint.manifest", "thinwire.files.locks",
    "thinwire.train.folder", "thinwire.train.launch", "thinwire.train.worker", "thinwire.plan.plan", "thinwire.model.spec",
    "thinwire.model.config", "thinwire.cluster.cluster", "thinwire.data.prepare", "thinwire.data.loader",
    "thinwire.comm.place", "thinwire.comm.interfaces", "thinwire.cli.eval", "thinwire.cli.generate",
    "thinwire.predict.step", "thinwire.predict.sent",
    "thinwire.predict.perturbation", "thinwire.plan.program", "thinwire.predict.planned", "thinwire.cli.plan",
    "thinwire.planner.explain",
    "thinwire.cli.simulate",
    "thinwire.cli.lab", "thinwire.cli.report",
    "thinwire.cli.probe", "thinwire.probe.fit", "thinwire.report.page",
    "thinwire.lab.lab", "thinwire.lab.agent", "thinwire.lab.host",
    "thinwire.cli.launch", "thinwire.operate.slurm", "thinwire.operate.kubernetes",
    "thinwire.plan.sync", "thinwire.cluster.hardware", "thinwire.cli.presets",
    "thinwire.cli.export", "thinwire.cli.import_", "thinwire.hub.families", "thinwire.hub.names", "thinwire.hub.init",
]  # fmt: skip


def _room(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


FILES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_rooms_of_lower_rank_in_its_wing(path: Path) -> None:
    room = _room(path)
    for module in _imports(path):
        parts = module.split(".")
        if parts[0] != "thinwire" or len(parts) == 1:
            continue
        other = parts[1]
        if other == room:
            continue
        assert RANKS[other] < RANKS[room], f"{room} imports {other}"
        assert not (room in THINKING and other in DOING), f"{room} thinks, {other} does"
        assert not (room in DOING and other in THINKING), f"{room} does, {other} thinks"


@pytest.mark.parametrize("path", sorted((SOURCE / "model").glob("*.py")), ids=lambda path: path.name)
def test_the_model_does_not_know_that_it_is_distributed(path: Path) -> None:
    assert not any(module.startswith("torch.distributed") for module in _imports(path))


def test_what_answers_before_training_needs_no_torch() -> None:
    load = f"import importlib, sys\nfor name in {TORCH_FREE!r}: importlib.import_module(name)\n"
    code = load + "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_file_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"


MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


@cache
def _uses(module: str) -> frozenset[str]:
    """The modules that `module` imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    named = {name.removeprefix("thinwire.") for name in found if name.startswith("thinwire.")}
    return frozenset((named & MODULES.keys()) - {module})


def _longest(module: str, rooms: tuple[str, ...], above: tuple[str, ...] = ()) -> int:
    assert module not in above, f"imports go round: {' -> '.join((*above[above.index(module) :], module))}"
    inside = [used for used in _uses(module) if used.partition(".")[0] in rooms]
    return 1 + max((_depth(used, rooms, (*above, module)) for used in inside), default=0)


_KNOWN: dict[str, int] = {}


def _depth(module: str, rooms: tuple[str, ...], above: tuple[str, ...] = ()) -> int:
    if module not in _KNOWN:
        _KNOWN[module] = _longest(module, rooms, above)
    return _KNOWN[module]


@pytest.mark.parametrize(
    ("rooms", "most"), WINGS.items(), ids=lambda value: value[0] if isinstance(value, tuple) else ""
)
def test_no_import_goes_round_and_no_chain_is_longer_than_it_was(rooms: tuple[str, ...], most: int) -> None:
    depths = {module: _depth(module, rooms) for module in MODULES if module.partition(".")[0] in rooms}
    assert max(depths.values()) <= most, max(depths, key=depths.__getitem__)


def test_every_room_is_in_a_wing() -> None:
    assert {module.partition(".")[0] for module in MODULES} == {room for rooms in WINGS for room in rooms}


def test_a_file_name_names_one_file() -> None:
    names = Counter(
        path.name for path in FILES if path.parent.name != "cli" and path.name not in ("__init__.py", "config.py")
    )
    assert not {name for name, count in names.items() if count > 1}


def test_every_room_has_tests() -> None:
    rooms = {_room(path) for path in FILES if path.parent != SOURCE and path.name != "__init__.py"}
    tests = Path(__file__).parent
    assert not {room for room in rooms - {"rounds"} if not any((tests / room).glob("test_*.py"))}
