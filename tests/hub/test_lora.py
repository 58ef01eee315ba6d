"""Adapters on a frozen base: cut base and replicated adapters, peft's own maths, small checkpoints, a peft folder out."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_models import logits, save_model
from runs import make_corpus, run_tree, thinwire, train_in, write_run
from thinwire.checkpoint.pieces import newest_whole
from thinwire.config import build
from thinwire.errors import CheckpointError, ConfigError
from thinwire.evaluate.load import load_run
from thinwire.files.events import read_events, steps
from thinwire.hub.export_run import export_run
from thinwire.hub.native import Native
from thinwire.hub.pretrained import describe
from thinwire.model.config import LoraOptions
from thinwire.train.config import RunConfig
from thinwire.train.folder import EVENTS_FILE
from worlds import run_world

LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}
STEADY = {"kind": "constant", "warmup_steps": 2}
CUT = {"params": "all", "grads": "replica", "optimizer": "all", "frozen_weights": True}


def losses(folder: Path, corpus: Path, base: Path, levels: list[int], count: int, **sections: Any) -> list[float]:
    sections = {"run": {"steps": count}, "schedule": STEADY, "optimizer": {"lr": 2e-2}, **sections}
    tree = run_tree(folder, corpus, cluster={"levels": levels}, **sections)
    tree["model"] = {"hf": str(base), "lora": LORA}
    run_world(levels, train_in, tree)
    return [record["loss"] for record in steps(folder / EVENTS_FILE).values()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), tokenizer="bpe:300")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model("qwen2", folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_train_on_a_cut_base_resume_and_export_to_peft(corpus: Path, base: Path, tmp_path: Path) -> None:
    whole = losses(tmp_path / "whole", corpus, base, [1], 8)
    cut = losses(tmp_path / "cut", corpus, base, [2, 2], 5, plan={"partition": CUT})
    assert cut == pytest.approx(whole[:5], rel=1e-5)
    again = losses(tmp_path / "cut", corpus, base, [2], 8, plan={"partition": "zero3"})
    assert again == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < whole[0]
    started = next(read_events(tmp_path / "cut" / EVENTS_FILE, "run_start"))
    trained = started["held"]["optimizer"] // 8
    _, manifest = newest_whole(tmp_path / "cut" / "checkpoints")
    assert all("lora_" in name for name in manifest.tensors)
    adapters = sum(torch.Size(i.shape).numel() for n, i in manifest.tensors.items() if n.startswith("params/"))
    assert adapters < started["parameters"] / 4
    assert trained >= adapters
    export_run(tmp_path / "cut", tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (stated["r"], stated["base_model_name_or_path"]) == (4, str(base))
    assert not (tmp_path / "out" / "config.json").exists()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    ours = load_run(tmp_path / "cut").model
    assert isinstance(ours, Native)
    torch.testing.assert_close(logits(theirs), logits(ours.module), atol=1e-6, rtol=1e-6)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.allclose(logits(theirs), plain, atol=1e-4)


@pytest.mark.slow
def test_adapters_of_another_base_are_refused(corpus: Path, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(own)
    run = write_run(tmp_path, corpus, run={"steps": 2}, schedule={"warmup_steps": 0})
    rest = run.read_text().split("[data]")[1]
    lora = '[model.lora]\nrank = 4\ntargets = ["q_proj"]\n'
    run.write_text(f'[model]\nhf = "{own}"\n{lora}\n[data]{rest}')
    done = thinwire("train", run)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(own)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    model.save_pretrained(own)
    again = thinwire("train", run, "--set", "run.steps=3")
    assert again.returncode == 2, again.stderr
    assert "holds adapters for other weights than those in" in again.stderr
    with pytest.raises(CheckpointError, match="belong to other weights"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"lora": {"rank": 4}}, "lora goes with hf = DIR"),
        ({"hf": "x", "lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"hf": "x", "lora": {"ranks": 1}}, "did you mean 'rank'"),
        ({"hf": "x", "lora": {}, "layers": 2}, "gives the whole model; leave layers out"),
    ],
)
def test_wrong_adapter_sections_are_explained(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, {"model": model, "data": {"path": "x"}}, "run.toml")
    assert says in str(caught.value)


def test_layers_that_are_not_there_and_a_base_without_weights_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.lora: .*nothing_proj"):
        describe(base, lora=LoraOptions(targets=("nothing_proj",)))
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="no safetensors weights; adapters need a base"):
        describe(tmp_path, lora=LoraOptions())
