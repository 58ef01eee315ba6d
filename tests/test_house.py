"""The house: rooms import only lower ranks of their wing, the thinking wing needs no torch, the model no distribution."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "thinwire"
RANKS = {
    "units": 0, "errors": 0, "config": 0, "events": 0, "wire": 0, "traffic": 0, "trace": 0, "folders": 0,
    "processes": 0, "locks": 0,
    "cluster": 1, "model": 1, "data": 1, "rounds": 1,
    "plan": 2, "comm": 2,
    "cost": 3, "partition": 3,
    "parallel": 4, "simulate": 4, "checkpoint": 4, "sync": 4,
    "planner": 5, "evaluate": 5, "hub": 5, "resilience": 5,
    "train": 6, "lab": 6, "probe": 7, "report": 7, "launchers": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
SAME_RANK_ALLOWED = {
    ("config", "errors"),
    ("units", "errors"),
    ("events", "errors"),
    ("folders", "errors"),
    ("folders", "processes"),
    ("locks", "errors"),
    ("locks", "processes"),
    ("evaluate", "hub"),
}
THINKING = {"cost", "simulate", "planner", "report", "lab"}
DOING = {"comm", "partition", "sync", "parallel", "checkpoint", "evaluate", "hub", "resilience", "train", "probe"}
TORCH_FREE = [
    "thinwire.cli", "thinwire.cli.train", "thinwire.cli.data", "thinwire.train.config", "thinwire.train.job",
    "thinwire.checkpoint.listing", "thinwire.locks",
    "thinwire.train.folder", "thinwire.train.launch", "thinwire.train.worker", "thinwire.plan", "thinwire.model.spec",
    "thinwire.model.config", "thinwire.cluster.cluster", "thinwire.data.prepare", "thinwire.data.loader",
    "thinwire.comm.place", "thinwire.comm.interfaces", "thinwire.cli.eval", "thinwire.cli.generate",
    "thinwire.cost.step", "thinwire.cost.sent",
    "thinwire.cost.failures", "thinwire.traffic", "thinwire.cli.plan", "thinwire.planner.explain",
    "thinwire.cli.simulate", "thinwire.simulate.trace",
    "thinwire.cli.lab", "thinwire.cli.lab_train", "thinwire.cli.report",
    "thinwire.cli.probe", "thinwire.probe.fit", "thinwire.report.write",
    "thinwire.lab.lab", "thinwire.lab.agent", "thinwire.lab.clean",
    "thinwire.cli.launch", "thinwire.launchers.slurm", "thinwire.launchers.kubernetes",
    "thinwire.rounds.config", "thinwire.cluster.found", "thinwire.cli.presets", "thinwire.cli.shortage",
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
        assert RANKS[other] < RANKS[room] or (room, other) in SAME_RANK_ALLOWED, f"{room} imports {other}"
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
