"""Every Python block of the documentation runs as it stands, after what its page takes for granted."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labs import need_lab
from thinwire import Cluster, OuterSync, ShardedOptimizer, World, shard
from thinwire.cluster.cluster import Level
from thinwire.plan.plan import Plan, PlanConfig
from thinwire.plan.sync import SyncConfig

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    str(page.relative_to(ROOT)): found
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if (found := _BLOCK.findall(page.read_text(encoding="utf-8")))
}


def _run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    (block,) = BLOCKS[page]
    exec(compile(block, page, "exec"), names)
    return names


def _setting(**plan: Any) -> tuple[Cluster, Plan, nn.Module]:
    cluster = Cluster(levels=(Level(name="node", fanout=1),))
    torch.manual_seed(0)
    return cluster, PlanConfig(**plan).resolve(cluster, micro_batch=4, accumulate=2), nn.Linear(3, 1)


def test_every_page_with_python_is_tested_here_or_as_a_transcript() -> None:
    assert set(BLOCKS) == {"README.md", "docs/sync.md", "docs/planning.md", "docs/lab.md", "docs/huggingface.md"}


def test_the_loop_of_the_first_page_takes_a_step() -> None:
    cluster, plan, model = _setting(partition="zero3")
    world = World.from_environment(cluster, {})
    before = model.weight.detach().clone()

    def loss(out: Tensor) -> Tensor:
        return out.square().sum()

    found = _run("README.md", {
        "shard": shard, "ShardedOptimizer": ShardedOptimizer, "torch": torch, "model": model, "plan": plan, "world": world,
        "micro_batches": list(torch.ones(2, 4, 3)), "loss": loss,
    })  # fmt: skip
    assert found["optimizer"].updates == 1
    with found["sharded"].full_parameters():
        assert not torch.equal(model.weight, before)


def test_the_loop_of_worker_groups_takes_a_step() -> None:
    cluster, plan, model = _setting(partition="ddp", sync=SyncConfig(kind="diloco", inner_steps=2))
    model.bias = None
    sharded_step = {"done": False}

    class Optimizer(ShardedOptimizer):
        """The page leaves forward and backward out."""

        def step(self, *, grad_scale: float = 1.0) -> None:
            sharded: Any = self._engine
            with sharded.micro_batch(last=True):
                sharded.module(torch.ones(4, 3)).sum().backward()
            sharded.finish_reduce()
            super().step(grad_scale=grad_scale)
            sharded_step["done"] = True

    found = _run("docs/sync.md", {
        "World": World, "os": type("os", (), {"environ": {}}), "cluster": cluster, "plan": plan, "shard": shard,
        "model": model, "ShardedOptimizer": Optimizer, "torch": torch, "OuterSync": OuterSync, "step": 1,
    })  # fmt: skip
    assert sharded_step["done"] and found["sync"].step == 1


def test_a_plan_is_made_and_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    _run("docs/planning.md", {})
    partition, seconds = capsys.readouterr().out.rsplit(" ", 1)
    assert partition.startswith("(") and float(seconds) > 0


def test_a_lab_is_built_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need_lab()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("import time; time.sleep(0.5)\n")
    found = _run("docs/lab.md", {"sys": sys})
    assert int(capsys.readouterr().out) >= 0
    assert found["outcome"].ok and len(found["outcome"].ends) == 4, found["outcome"]
