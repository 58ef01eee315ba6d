"""What a sentence suggests helps: following it is accepted, and nobody is told to take what he has."""

from pathlib import Path

import pytest
import tomli_w
import torch

from runs import here, make_corpus, write_run
from thinwire.cluster.cluster import Cluster, Level
from thinwire.cluster.config import ClusterConfig
from thinwire.cluster.hardware import calibration_of, device_preset
from thinwire.config import build, load
from thinwire.errors import ConfigError, DivergenceError, PlanError
from thinwire.model.config import ModelConfig
from thinwire.model.generate import pick
from thinwire.model.presets import preset
from thinwire.plan.plan import PlanConfig
from thinwire.plan.sync import SyncConfig
from thinwire.planner.choose import choose
from thinwire.planner.search import search
from thinwire.planner.space import Space
from thinwire.predict.candidate import Setting
from thinwire.train.config import RunConfig
from thinwire.train.schedule import lr_at, said_of_changes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a100", "did you mean 'a100-80g' or 'a100-40g'?"),
        ("H100", "did you mean 'h100'?"),
        ("h10", "'h100'"),
        ("zzz", "there are cpu"),
    ],
)
def test_a_device_is_found_by_how_its_name_begins(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match="there is no device") as caught:
        device_preset(name)
    assert says in str(caught.value)


def test_lowrank_under_rounds_is_not_sent_to_a_level_that_is_refused_too() -> None:
    cluster = build(ClusterConfig, {"levels": [2, 2], "device": "cpu"}, "test").resolve()
    config = {"compression": {"grads": {"node": "lowrank"}}, "sync": {"inner_steps": 4}}
    with pytest.raises(PlanError, match="leave it out") as caught:
        build(PlanConfig, config, "test").resolve(cluster, micro_batch=1, accumulate=1)
    assert "needs the outermost level" not in str(caught.value)
    build(PlanConfig, {"sync": {"inner_steps": 4, "codec": "int8"}}, "test").resolve(
        cluster, micro_batch=1, accumulate=1
    )


@pytest.mark.parametrize(
    ("given", "way_out", "accepted"),
    [
        ({"codec": "int8"}, "leave codec out", {}),
        ({"kind": "streaming_diloco"}, "use kind = 'diloco'", {"kind": "diloco"}),
        ({"kind": "sparse"}, "use kind = 'diloco'", {"kind": "diloco"}),
    ],
)
def test_one_group_codes_nothing(given: dict[str, str], way_out: str, accepted: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="there is one group") as caught:
        SyncConfig.model_validate({"inner_steps": 30, **given}).resolve([("site", 1)])
    assert way_out in str(caught.value)
    assert SyncConfig.model_validate({"inner_steps": 30, **accepted}).resolve([("site", 1)]).codec == "fp32"


def _setting(levels: tuple[Level, ...], sequences: int, model: str = "llama-3-70b") -> Setting:
    cluster = Cluster(device=device_preset("h100"), levels=levels)
    return Setting(preset(model), cluster, sequences, 2048, calibration=calibration_of(cluster), compute_dtype="bf16")


NODE = Level(name="node", fanout=8, bytes_per_s=4e11, latency_s=5e-6)


def test_a_model_too_large_for_a_node_is_told_how_many_nodes_would_do() -> None:
    with pytest.raises(PlanError, match=r"; 2 nodes of 8, cluster\.levels = \[8, 2\] \(16 ranks\) would fit"):
        choose(_setting((NODE,), 16), Space())
    second = Level(name="cluster", fanout=2, bytes_per_s=4e11, latency_s=5e-6)
    assert choose(_setting((NODE, second), 16), Space()).every_step.best


def test_a_batch_that_divides_is_not_suggested_again() -> None:
    with pytest.raises(PlanError, match="with micro_batch = 3") as caught:
        search(_setting((NODE,), 32, "llama-1m"), Space(runnable=True, fixed={"micro_batch": 3}))
    assert "try batch.sequences" not in str(caught.value)


def test_lora_on_imported_weights_names_the_way() -> None:
    with pytest.raises(ConfigError, match="write hf = DIR"):
        build(ModelConfig, {"init": "x", "lora": {}}, "test")


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-8b", "qwen2.5-0.5b", "gpt2"])
def test_a_preset_with_any_key_at_its_own_value_is_the_same_model(name: str) -> None:
    spec = preset(name)
    for key, value in spec.model_dump().items():
        assert ModelConfig.model_validate({"preset": name, key: value}).resolve() == spec, key
    assert ModelConfig(preset="llama-3-8b", heads=16).resolve().kv_heads == 16


def _config(tmp_path: Path, *settings: str) -> RunConfig:
    (tmp_path / "run.toml").write_text(tomli_w.dumps({"data": {"path": "corpus"}, "optimizer": {"lr": 1.0}}))
    return load(RunConfig, tmp_path / "run.toml", settings)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (14, 1), (20, 1), (21, 20), (300, 20)])
def test_a_default_warm_up_fits_the_run(tmp_path: Path, steps: int, warmup: int) -> None:
    config = _config(tmp_path, f"run.steps={steps}")
    assert config.schedule.warmup(steps) == warmup
    rates = [lr_at(step, peak=1.0, total_steps=steps, schedule=config.schedule) for step in range(steps)]
    assert max(rates) == 1.0
    if steps <= 20:
        with pytest.raises(ConfigError, match="leaves nothing"):
            _config(tmp_path, f"run.steps={steps}", "schedule.warmup_steps=20")


def test_a_prolonged_run_names_the_steps_whose_rate_would_have_been_another(tmp_path: Path) -> None:
    """By hand: linear from step 20 on, so of a run of 40 that goes on to 60 steps 22 to 40 differ (21 is the peak)."""
    linear = ("schedule.kind=linear", "schedule.warmup_steps=20")
    old, new = (_config(tmp_path, f"run.steps={steps}", *linear) for steps in (40, 60))
    (said,) = said_of_changes(old, new, 40)
    assert "run.steps was 40, now 60, which moves the schedule: steps 22 to 40 had a learning rate" in said
    assert "step 40 had lr 1.450e-01 (there 5.725e-01), step 41 takes 5.500e-01" in said
    constant = [_config(tmp_path, f"run.steps={steps}", "schedule.kind=constant") for steps in (40, 60)]
    assert said_of_changes(*constant, 40) == ()
    assert said_of_changes(old, old, 40) == ()
    other = _config(tmp_path, "run.steps=40", "optimizer.lr=0.5", *linear)
    assert said_of_changes(old, other, 7) == ("optimizer.lr was 1, it is 0.5 from step 8 on",)


def test_a_run_file_alone_in_its_folder_is_not_taken_for_a_run(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, make_corpus(tmp_path), run={"folder": str(tmp_path)})
    text = run_file.read_text()
    done = here(["train", str(run_file)], tmp_path)
    assert done.returncode == 2 and "holds no plan.json" in done.stderr
    assert run_file.read_text() == text


def test_weights_that_have_diverged_are_told() -> None:
    with pytest.raises(DivergenceError, match="not finite"):
        pick(torch.tensor([0.0, float("nan")]), temperature=1.0, top_p=1.0, generator=torch.Generator())
