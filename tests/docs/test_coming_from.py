"""Every name on the page for those who come from another framework exists: theirs where installed, ours always.

Names of theirs are looked up in torch itself, and in the source of DeepSpeed, torchtitan and torchft without importing it.
"""

import ast
import importlib
import importlib.util
import inspect
import itertools
import re
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
from pydantic import BaseModel

import thinwire
from thinwire.cli import app
from thinwire.config import build
from thinwire.errors import ThinwireError
from thinwire.train.config import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
_CODE = re.compile(r"`([^`]+)`")
_SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+( = .+)?")
PARTITIONS = ("auto", "ddp", "zero1", "zero2", "zero3", "hsdp", "mics", "zero++", "frontier")
TORCH_MODULES = (
    "torch.distributed.fsdp", "torch.nn.parallel", "torch.distributed.optim", "torch.utils.checkpoint",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook",
)  # fmt: skip
"""Where a name without a dot is looked for."""
DEEPSPEED_SECTIONS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "activation_checkpointing": ("runtime/activation_checkpointing/config.py", None),
    "tensor_parallel": ("runtime/tensor_parallel/config.py", "TPTrainingConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
}
"""Where a section's keys are read: the fields of a class, or (None) the names that a file has as constants."""
DEEPSPEED_KEYS = (
    "runtime/constants.py", "runtime/config.py", "runtime/activation_checkpointing/config.py", "runtime/zero/config.py",
    "runtime/swap_tensor/constants.py", "runtime/data_pipeline/constants.py", "runtime/tensor_parallel/init_utils.py",
    "runtime/lr_schedules.py", "monitor/config.py", "comm/constants.py", "autotuning/constants.py",
)  # fmt: skip
"""Whose constants are sections, keys outside of sections, and keys of the sections that have no class."""
TORCHTITAN_SECTIONS = {
    "training": (("config/configs.py", "TrainingConfig"),),
    "parallelism": (("config/configs.py", "ParallelismConfig"),),
    "compile": (("config/configs.py", "CompileConfig"),),
    "comm": (("config/configs.py", "CommConfig"),),
    "debug": (("config/configs.py", "DebugConfig"),),
    "optimizer": (("components/optimizer/optimizer.py", "OptimizersContainer.Config"),),
    "lr_scheduler": (("components/optimizer/lr_scheduler.py", "LRSchedulersContainer.Config"),),
    "metrics": (("components/metrics.py", "MetricsProcessor.Config"),),
    "validator": (
        ("components/validate.py", "BaseValidator.Config"), ("components/validate.py", "Validator.Config"),
    ),
    "checkpoint": (
        ("components/checkpointer/base.py", "BaseCheckpointManager.Config"),
        ("components/checkpointer/dcp.py", "CheckpointManager.Config"),
    ),
    "fault_tolerance": (
        ("experiments/torchft/config/job_config.py", "FaultTolerance"),
        ("experiments/torchft/manager.py", "TorchFTManager.Config"),
    ),
}  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def _rows(section: str) -> list[tuple[str, str]]:
    """(theirs, ours) of each row of a section's table."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == 2 for row in cells), [row for row in cells if len(row) != 2]
    return [(theirs, ours) for theirs, ours in cells[2:]]


def _theirs(section: str) -> list[Any]:
    """(row's cell, name) of everything in code on the left."""
    return [pytest.param(cell, name, id=name) for cell, _ in _rows(section) for name in _CODE.findall(cell)]


SECTIONS = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
OURS = sorted({name for section in SECTIONS for _, ours in _rows(section) for name in _CODE.findall(ours)})


def test_the_page_has_the_four_frameworks_and_no_empty_cell() -> None:
    assert SECTIONS == ["PyTorch FSDP and DDP", "DeepSpeed", "torchtitan", "torchft"]
    for theirs, ours in itertools.chain.from_iterable(map(_rows, SECTIONS)):
        assert _CODE.search(theirs), f"{theirs!r} names nothing"
        assert _CODE.search(ours) or ours.startswith(("none", "always")), f"{theirs!r}: {ours!r} names nothing"


@pytest.mark.parametrize("package", ["torch", "deepspeed", "torchtitan", "torchft"])
def test_the_versions_on_the_page_are_those_it_is_checked_against(package: str) -> None:
    named = re.search(rf"Checked against.*?\b{package} (\d+(?:\.\d+)*)", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert named
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    assert installed.partition("+")[0] == named[1]


# -- ours --------------------------------------------------------------------------------------------------------------


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The config model in an annotation such as `Compression | None`."""
    found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in found if issubclass(kind, BaseModel)), None)


def _has_key(path: str) -> bool:
    """Whether the run file has this key, or section."""
    model: type[BaseModel] | None = RunConfig
    for key in path.split("."):
        if model is None or key not in model.model_fields:
            return False
        model = _model_of(model.model_fields[key].annotation)
    return True


def _check_run(setting: str) -> None:
    """A run file with this line, on two levels, is valid and has a plan. Raises ThinwireError."""
    levels = 'cluster.levels = [{ name = "node", fanout = 2 }, { name = "cluster", fanout = 2 }]'
    text = f'data.path = "corpus"\n{levels}\n{setting}\n'
    if setting.startswith("plan.sync"):
        text += 'plan.partition = "zero1"\n'
    config = build(RunConfig, tomllib.loads(text), setting)
    config.plan.resolve(config.cluster.resolve(), micro_batch=1, accumulate=1)


def _check_command(line: str) -> None:
    words = line.split()[1:]
    context = click.Context(typer.main.get_command(app))
    command = context.command.get_command(context, words[0])  # type: ignore[attr-defined]
    assert command is not None, f"no such command: {line}"
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= options, f"{line}: there are {', '.join(options)}"


def _check_ours(name: str) -> None:
    """Raises AssertionError or ThinwireError unless `name` is something of ours."""
    if name in PARTITIONS:
        _check_run(f'plan.partition = "{name}"')
    elif name.startswith("thinwire "):
        _check_command(name)
    elif _SETTING.fullmatch(name):
        key, _, value = name.partition(" = ")
        assert _has_key(key), f"{key} is no key of a run file"
        if value:
            _check_run(name)
    elif "." not in name and name in _choices("schedule", "kind"):
        _check_run(f'schedule.kind = "{name}"')
    else:
        _check_call(name, {public: getattr(thinwire, public) for public in thinwire.__all__})


def _choices(section: str, key: str) -> tuple[Any, ...]:
    model = _model_of(RunConfig.model_fields[section].annotation)
    return get_args(model.model_fields[key].annotation) if model else ()


@pytest.mark.parametrize("name", OURS)
def test_a_name_on_the_right_is_ours(name: str) -> None:
    _check_ours(name)


@pytest.mark.parametrize(
    "name",
    ["zero4", "plan.keep_gatherd", "plan.keep_gathered = 7", 'plan.compression.grads = { rack = "bf16" }', "thinwire trian",
     'plan.compression.grads = { cluster = "fp8" }', "plan.sync.kindd", 'plan.sync.kind = "diloko"', "batch.sequences.more",
     "Sharded.micro_batch(final=True)", "Sharded.no_sync()", "shard(unit=...)", "thinwire export RUN --precison bf16"],
)  # fmt: skip
def test_a_name_that_is_not_ours_is_found_out(name: str) -> None:
    with pytest.raises((AssertionError, ThinwireError)):
        _check_ours(name)


# -- torch -------------------------------------------------------------------------------------------------------------


@cache
def _torch_names() -> dict[str, Any]:
    import torch

    names: dict[str, Any] = {"torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by modules of torch itself
        importlib.import_module("torch.distributed.checkpoint")
        modules = [importlib.import_module(name) for name in TORCH_MODULES]
    for module in modules:
        names |= {name: value for name, value in vars(module).items() if name not in names}
    return names


def _check_call(text: str, names: dict[str, Any]) -> None:
    """`text` is an expression whose names exist and whose calls have only arguments that exist, by `inspect`."""
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.Name):
            assert node.id in names, f"no such name: {node.id}"
        elif isinstance(node, ast.Attribute):
            _look_up(node, names)
        elif isinstance(node, ast.Call):
            parameters = inspect.signature(_look_up(node.func, names)).parameters
            wrong = [keyword.arg for keyword in node.keywords if keyword.arg not in parameters]
            assert not wrong, f"{text}: {', '.join(map(str, wrong))} is not among {', '.join(parameters)}"


def _look_up(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        assert node.id in names, f"no such name: {node.id}"
        return names[node.id]
    assert isinstance(node, ast.Attribute), ast.unparse(node)
    owner = _look_up(node.value, names)
    assert hasattr(owner, node.attr), f"no such name: {ast.unparse(node)}"
    return getattr(owner, node.attr)


@pytest.mark.parametrize(("cell", "name"), _theirs("PyTorch FSDP and DDP"))
def test_a_name_of_torch_exists(cell: str, name: str) -> None:
    _check_call(name, _torch_names())


@pytest.mark.parametrize(
    "name",
    ["fully_shard(reshard=True)", "MixedPrecisionPolicy(grad_dtype=torch.float32)", "ShardingStrategy.HALF_SHARD",
     "FSDPModule.no_sync", "fully_sharded", "MixedPrecision(param_dtype=torch.bfloat)"],
)  # fmt: skip
def test_a_name_that_torch_does_not_have_is_found_out(name: str) -> None:
    with pytest.raises(AssertionError):
        _check_call(name, _torch_names())


# -- sources that are read, not imported -------------------------------------------------------------------------------


def _source(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0])


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _classes(body: list[ast.stmt], outer: str = "") -> Iterator[tuple[str, ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield outer + node.name, node
            yield from _classes(node.body, f"{outer}{node.name}.")


def _class(path: Path, name: str) -> ast.ClassDef:
    found = dict(_classes(_tree(path).body))
    assert name in found, f"{path.name} has no class {name}"
    return found[name]


def _fields(path: Path, name: str) -> set[str]:
    """Annotated fields of a class, by name and by alias."""
    fields = [node for node in _class(path, name).body if isinstance(node, ast.AnnAssign)]
    keywords = [keyword for node in fields for keyword in ast.walk(node) if isinstance(keyword, ast.keyword)]
    aliases = {word.value.value for word in keywords if word.arg == "alias" and isinstance(word.value, ast.Constant)}
    return {ast.unparse(node.target) for node in fields} | {str(alias) for alias in aliases}


def _strings(node: ast.AST) -> set[str]:
    found = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))
    return {value for value in found if isinstance(value, str)}


def _removed(root: Path) -> set[str]:
    """Keys that DeepSpeed refuses, because what they asked for is gone."""
    tree = _tree(root / "runtime/config.py")
    tables = [
        node for node in tree.body if isinstance(node, ast.Assign) and "_REMOVED_" in ast.unparse(node.targets[0])
    ]
    keys = [key for node in tables if isinstance(node.value, ast.Dict) for key in node.value.keys if key is not None]
    return {key.value for key in keys if isinstance(key, ast.Constant)}


def _check_deepspeed(cell: str, name: str) -> None:
    root = _source("deepspeed")
    section, _, key = name.rpartition(".")
    if section == "DeepSpeedEngine":
        methods = {n.name for n in _class(root / "runtime/engine.py", section).body if isinstance(n, ast.FunctionDef)}
        assert key in methods, f"no such method: {name}"
    elif "removed" in cell:
        assert key in _removed(root), f"{name} was not removed"
    elif name in dict(_classes(_tree(root / "runtime/lr_schedules.py").body)):
        pass
    else:
        assert key not in _removed(root), f"{name} was removed"
        assert key in _deepspeed_keys(root, section), f"no such key: {name}"
        assert not section or section in _deepspeed_keys(root, ""), f"no such section: {section}"


def _deepspeed_keys(root: Path, section: str) -> set[str]:
    if section not in DEEPSPEED_SECTIONS:
        return set().union(*(_strings(_tree(root / path)) for path in DEEPSPEED_KEYS))
    path, name = DEEPSPEED_SECTIONS[section]
    return _strings(_tree(root / path)) if name is None else _fields(root / path, name)


@pytest.mark.parametrize(("cell", "name"), _theirs("DeepSpeed"))
def test_a_name_of_deepspeed_exists(cell: str, name: str) -> None:
    _check_deepspeed(cell, name)


@pytest.mark.parametrize(
    "name",
    ["zero_optimization.stages", "zero_optimization.mics_shard_size", "gradient_clip", "bf16.enable", "fp15.enabled",
     "bf16.loss_scale", "offload_optimiser", "DeepSpeedEngine.nosync", "sparse_attention"],
)  # fmt: skip
def test_a_name_that_deepspeed_does_not_have_is_found_out(name: str) -> None:
    with pytest.raises(AssertionError):
        _check_deepspeed(f"`{name}`", name)


def test_a_key_that_is_called_removed_but_lives_is_found_out() -> None:
    with pytest.raises(AssertionError):
        _check_deepspeed("`zero_optimization.stage` (removed in their release)", "zero_optimization.stage")


def _check_torchtitan(name: str) -> None:
    root = _source("torchtitan")
    sections = _fields(root / "trainer.py", "Trainer.Config")
    sections |= _fields(root / "experiments/torchft/trainer.py", "FaultTolerantTrainer.Config")
    if ":" in name:
        section, _, chosen = name.partition(":")
        assert section.replace("-", "_") in sections, f"no such section: {section}"
        assert chosen in _subcommands(root / "distributed/activation_checkpoint.py"), f"no such choice: {name}"
        return
    section, _, key = name.rpartition(".")
    assert (section or key) in sections, f"no such section: {name}"
    if section:
        assert any(key in _fields(root / path, kind) for path, kind in TORCHTITAN_SECTIONS[section]), f"no key: {name}"


def _subcommands(path: Path) -> set[str]:
    calls = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)]
    return set().union(*(_strings(node) for node in calls if ast.unparse(node.func).endswith("subcommand")))


@pytest.mark.parametrize(("cell", "name"), _theirs("torchtitan"))
def test_a_name_of_torchtitan_exists(cell: str, name: str) -> None:
    root = _source("torchtitan")
    if re.fullmatch(r"[a-z0-9]+", name) and "` of `" in cell:  # a value of the key before it
        section, _, key = _CODE.findall(cell)[0].rpartition(".")
        holders = [_class(root / path, kind) for path, kind in TORCHTITAN_SECTIONS[section]]
        fields = [node for holder in holders for node in holder.body if isinstance(node, ast.AnnAssign)]
        values = [_strings(node.annotation) for node in fields if ast.unparse(node.target) == key]
        assert values and name in values[0], f"{section}.{key} has no value {name}"
        return
    _check_torchtitan(name)


@pytest.mark.parametrize(
    "name", ["training.compile", "training.seqlen", "checkpoint.every", "activation-checkpoint:half", "job.dump_folder"]
)
def test_a_name_that_torchtitan_does_not_have_is_found_out(name: str) -> None:
    with pytest.raises(AssertionError):
        _check_torchtitan(name)


def _check_torchft(text: str) -> None:
    """`text` is a call of a class of torchft, with arguments that its `__init__` has by name."""
    root = _source("torchft")
    files = [root / name for name in ("local_sgd.py", "manager.py", "ddp.py")]
    classes = dict(found for path in files for found in _classes(_tree(path).body))
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call), f"{text} is no call"
    name = ast.unparse(call.func)
    assert name in classes, f"no such class: {name}"
    made = [node for node in classes[name].body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    arguments = {argument.arg for node in made for argument in (*node.args.args, *node.args.kwonlyargs)}
    wrong = [keyword.arg for keyword in call.keywords if keyword.arg not in arguments]
    assert not wrong, f"{text}: {wrong} is not among {sorted(arguments)}"


@pytest.mark.parametrize(("cell", "name"), _theirs("torchft"))
def test_a_name_of_torchft_exists(cell: str, name: str) -> None:
    _check_torchft(name)


@pytest.mark.parametrize("name", ["DiLoCo(sync_steps=...)", "LocalSGD(should_quantize=True)", "Diloco(sync_every=...)"])
def test_a_name_that_torchft_does_not_have_is_found_out(name: str) -> None:
    with pytest.raises(AssertionError):
        _check_torchft(name)
