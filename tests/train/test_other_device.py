"""A run on a device that is not the CPU: nothing that is made for the model is made elsewhere, to its last line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from other_device import other_device
from runs import make_corpus, write_run
from thinwire.comm.world import World
from thinwire.data.loader import evaluation_batches
from thinwire.evaluate.load import load_run
from thinwire.evaluate.scoring import score
from thinwire.model.generate import generate
from thinwire.train.folder import open_folder
from thinwire.train.job import read_config, resolve
from thinwire.train.stop import StopRequest
from thinwire.train.worker import train_job
from worlds import run_world

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": 3, "sample_tokens": 8, "eval_every": 2},
    "data": {"cross_documents": False},
    "checkpoint": {"every_steps": 2},
}


def _train(world: World, run_file: Path, settings: list[str], *, elsewhere: bool) -> list[float]:
    """Losses of the run's steps, then of its validations."""
    if elsewhere:  # as ranks that share an accelerator: with communicators of the CPU
        world = replace(world, device=torch.device("elsewhere", 0), over_host=True)
        world = world.among(range(world.size), world.cluster)
    job = resolve(run_file, read_config(run_file, settings))
    if world.rank == 0:
        open_folder(job, fresh=False)
    train_job(job, world, StopRequest())
    events = [json.loads(line) for line in (job.folder / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for kind in ("step", "eval") for event in events if event["event"] == kind]


def _train_and_go_on(world: World, run_file: Path, elsewhere: bool) -> tuple[list[float], list[int], float]:
    """Train, train on from the checkpoint; (all losses, a text, the loss of what `eval` reads)."""
    device = other_device() if elsewhere else torch.device("cpu")
    _train(world, run_file, [], elsewhere=elsewhere)
    losses = _train(world, run_file, ["run.steps=5"], elsewhere=elsewhere)
    run = load_run(run_file.with_suffix(""), device=device)
    assert run.model.device.type == device.type
    ids = list(generate(run.model, [100, 101], max_new_tokens=12, max_tokens=64, seed=3))
    corpus = run.corpus()
    assert corpus.heldout is not None
    batches = evaluation_batches(corpus.heldout, 32, 4, limit=8, vocab_size=257, cross_documents=False)
    return losses, ids, score(run.model, batches, token_bytes=None, cross_documents=False).loss


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (2, {"compression": {"grads": {"node": "int8"}}}),
        pytest.param(2, {"partition": "ddp", "sync": {"inner_steps": 1, "level": "node"}}, marks=pytest.mark.slow),
    ],
    ids=["one rank", "two ranks", "two groups"],
)
def test_a_run_on_another_device_is_that_of_the_cpu(ranks: int, plan: dict[str, Any], tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    sections = {**SECTIONS, "plan": plan, "cluster": {"levels": [ranks]}}
    here, there = (
        run_world(ranks, _train_and_go_on, write_run(tmp_path, corpus, name, **sections), elsewhere)[0]
        for name, elsewhere in (("here", False), ("there", True))
    )
    assert len(here[0]) >= 5 + 4
    assert there[0] == pytest.approx(here[0], rel=1e-6)
    assert there[1] == here[1]
    assert there[2] == pytest.approx(here[2], rel=1e-6)


def _mix(world: World) -> str:
    device = other_device()
    with pytest.raises(RuntimeError, match="at least two devices") as raised:
        torch.nn.functional.embedding(torch.tensor([1]), torch.ones(3, 2, device=device))
    return str(raised.value)


def test_the_other_device_refuses_what_the_cpu_holds() -> None:
    assert "elsewhere:0 and cpu" in run_world(1, _mix)[0]
