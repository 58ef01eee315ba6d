"""The optimizers that a run file names compute what torch's do in one process, hold what is predicted, and are resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partition_toy import plan_of
from runs import make_corpus, run_tree, thinwire, train_in, write_run
from thinwire.checkpoint.manifest import list_checkpoints
from thinwire.checkpoint.pieces import newest_whole, read_tensors
from thinwire.comm.world import World
from thinwire.config import build
from thinwire.errors import CheckpointError
from thinwire.parallel.shard.engine import shard
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.predict.candidate import thinwire_with
from thinwire.train.announce import held_bytes
from thinwire.train.assemble import build_optimizer
from thinwire.train.config import RunConfig
from thinwire.train.folder import CHECKPOINTS, RUN_FILE
from thinwire.train.job import resolve
from thinwire.train.stop import StopRequest
from thinwire.train.worker import train_job
from worlds import run_world

ADAMW = OptimizerConfig(lr=0.05)
SGD = OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
PLAIN = OptimizerConfig(name="sgd", lr=0.05)
STEPS = 4


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).double()


def _batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def _in_one_process(options: OptimizerConfig) -> list[torch.Tensor]:
    """What torch makes of the batches of two ranks."""
    model = _model()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if options.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)
    else:
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
    for step in range(STEPS):
        sum(model(_batch(step, rank)).square().sum() for rank in range(2)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def _under_a_plan(world: World, cut: tuple[int, int, int], options: OptimizerConfig) -> tuple[Any, int, int, float]:
    """(full parameters after the steps, bytes of masters and states here, as told, as predicted)."""
    engine = shard(_model(), plan_of(world, cut, compute_dtype="fp64"), world)
    optimizer = build_optimizer(engine, options)
    for step in range(STEPS):
        with engine.micro_batch(last=True):
            engine.module(_batch(step, world.rank)).square().sum().backward()
        engine.finish_reduce()
        optimizer.step()
    engine.drain()
    assert optimizer._optimizer is not None
    states = [value for state in optimizer._optimizer.state.values() for value in state.values()]
    own = [t for t in states if isinstance(t, torch.Tensor) and t.dim()]  # the count of steps is one number
    held = sum(t.nbytes for t in [*own, *(part.master for part in engine.owned())])
    elements = sum(parameter.numel() for parameter in _model().parameters())
    predicted = 2 * thinwire_with(options).optimizer_bytes * elements / world.size  # in fp64
    with engine.full_parameters():
        full = [parameter.detach().clone() for parameter in engine.module.parameters()]
    return full, held, held_bytes(engine, options.state_numbers)["optimizer"], predicted


@pytest.mark.parametrize("options", [ADAMW, SGD, PLAIN], ids=["adamw", "momentum", "plain sgd"])
@pytest.mark.parametrize("cut", [(-1, -1, 0), (0, 0, 0)], ids=["zero1", "zero3"])
def test_two_ranks_compute_what_torch_does_in_one_process_and_hold_what_is_predicted(
    cut: tuple[int, int, int], options: OptimizerConfig
) -> None:
    expected = _in_one_process(options)
    for full, held, told, predicted in run_world(2, _under_a_plan, cut, options):
        for ours, theirs in zip(full, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert held == told == predicted


def _trained(world: World, trees: list[dict[str, Any]]) -> None:
    for tree in trees:
        train_in(world, tree)


def _resumed_with(world: World, tree: dict[str, Any]) -> None:
    """Past the check of the run file: what a copied checkpoint meets."""
    with pytest.raises(CheckpointError, match=r"holds the states of sgd, and optimizer\.name is 'adamw'"):
        train_job(resolve(Path("run.toml"), build(RunConfig, tree, "run.toml")), world, StopRequest())


@pytest.mark.parametrize("ranks", [2])
def test_a_run_with_sgd_goes_on_bit_for_bit_and_refuses_another_optimizer(tmp_path: Path, ranks: int) -> None:
    corpus = make_corpus(tmp_path / "data")
    sections: dict[str, Any] = {
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "cluster": {"levels": [ranks]},
        "plan": {"partition": "zero3"},
        "schedule": {"warmup_steps": 0, "kind": "constant"},
        "checkpoint": {"every_steps": 2},
        "tracking": {"to": []},
    }
    runs = {
        name: [run_tree(tmp_path / name, corpus, **sections, run={"steps": steps}) for steps in of_run]
        for name, of_run in {"whole": [4], "run": [2, 4]}.items()
    }
    run_world(ranks, _trained, [tree for trees in runs.values() for tree in trees])
    found = []
    for name in runs:
        path, manifest = newest_whole(tmp_path / name / CHECKPOINTS)
        assert manifest.meta["optimizer"] == "sgd"
        tensors = {tensor: value.clone() for tensor, value in read_tensors(path, manifest, "")}
        assert any(tensor.startswith("optimizer.momentum_buffer/") for tensor in tensors)
        found.append(tensors)
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    sections["optimizer"] = {"name": "adamw"}
    other = write_run(tmp_path, corpus, **sections, run={"steps": 6})
    refused = thinwire("train", other)
    assert refused.returncode == 2
    assert "optimizer.name was 'sgd', now 'adamw'" in refused.stderr
    tree = run_tree(tmp_path / "run", corpus, **sections, run={"steps": 6})
    run_world(ranks, _resumed_with, tree)
    assert len(list_checkpoints(tmp_path / "run" / CHECKPOINTS)) == 2
    assert 'name = "sgd"' in (tmp_path / "run" / RUN_FILE).read_text()
