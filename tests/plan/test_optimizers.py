"""`[optimizer]` by name: keys that do not belong to the one that is named are refused, never ignored."""

from pathlib import Path
from typing import Any

import pytest

from thinwire.config import build, dump_toml, load, parse_toml
from thinwire.errors import ConfigError
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.predict.candidate import THINWIRE, thinwire_with
from thinwire.train.config import RunFile

SGD = {"name": "sgd", "momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"name": "adam"}, "optimizer: name = 'adam' is unknown; did you mean 'adamw'?"),
        ({"name": "muon"}, "optimizer: name = 'muon' is unknown; there are adamw, sgd"),
        (
            {"momentum": 0.9},
            "optimizer: momentum belongs to sgd, and the optimizer is adamw; leave it out, or set optimizer.name = 'sgd'",
        ),
        (
            {"name": "sgd", "beta2": 0.9},
            "optimizer: beta2 belongs to adamw, and the optimizer is sgd; leave it out, or set optimizer.name = 'adamw'",
        ),
        (
            {"name": "sgd", "nesterov": True},
            "optimizer: nesterov = true needs momentum above 0; set optimizer.momentum = 0.9, or leave nesterov out",
        ),
        ({"name": 3}, "optimizer.name: must be text, not 3"),
        ({"name": "sgd", "momentum": 1.0}, "optimizer.momentum: must be less than 1, not 1.0"),
    ],
)
def test_what_the_named_optimizer_does_not_have_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RunFile, {"optimizer": keys}, "run.toml")
    assert str(caught.value) == f"run.toml: {sentence}"


@pytest.mark.parametrize("keys", [{}, SGD, {"name": "sgd"}, {"name": "adamw", "beta1": 0.8}])
def test_what_is_written_down_is_read_again(keys: dict[str, Any], tmp_path: Path) -> None:
    config = build(RunFile, {"optimizer": keys}, "run.toml")
    (tmp_path / "run.toml").write_text(dump_toml(config))
    assert load(RunFile, tmp_path / "run.toml") == config
    written = parse_toml(dump_toml(config))["optimizer"]
    assert ("beta1" in written) == (config.optimizer.name == "adamw") != ("momentum" in written)


def test_the_defaults_are_those_of_the_named_one() -> None:
    assert OptimizerConfig() == OptimizerConfig(name="adamw", lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    assert OptimizerConfig(name="sgd").weight_decay == 0
    assert OptimizerConfig(name="sgd", weight_decay=0.1).weight_decay == 0.1


def test_states_are_predicted_by_what_the_named_one_keeps() -> None:
    assert thinwire_with(OptimizerConfig()) == THINWIRE
    assert thinwire_with(OptimizerConfig(**SGD)).optimizer_bytes == 8
    assert thinwire_with(OptimizerConfig(name="sgd")).optimizer_bytes == 4
