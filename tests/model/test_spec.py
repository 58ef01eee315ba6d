"""Counts: parameters exactly as published and as built, FLOPs as torch counts them."""

import pytest
import torch
from published import hardware_flops_per_token
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from thinwire.config import build
from thinwire.errors import ConfigError
from thinwire.model.config import ModelConfig
from thinwire.model.presets import preset, preset_names
from thinwire.model.transformer import Transformer

PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "tinyllama-1.1b": 1_100_048_384, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3.2-1b": 1_235_814_400, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360,
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_the_published_count(name: str, parameters: int) -> None:
    assert preset(name).parameters == parameters


@pytest.mark.parametrize("name", preset_names())
def test_the_model_has_exactly_the_counted_parameters(name: str) -> None:
    spec = preset(name)
    with torch.device("cpu" if spec.parameters < 4_000_000 else "meta"):
        model = Transformer(spec)
    built = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert list(built.items()) == list(spec.parameter_shapes().items())
    assert sum(value.numel() for value in model.parameters()) == spec.parameters
    assert [key for unit in spec.units() for key in unit.parameters] == list(built)


@pytest.mark.parametrize("name", ["llama-1m", "llama-3m", "gpt2-1m"])
def test_flops_are_what_torch_counts(name: str) -> None:
    spec, tokens = preset(name), 64
    model = Transformer(spec)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, tokens, dtype=torch.long))
    assert counter.get_total_flops() == 2 * tokens * spec.forward_flops_per_token(tokens)


def test_recompute_adds_a_forward_without_the_head_and_mfu_does_not_see_it() -> None:
    spec = preset("megatron-22b")
    model, forward = spec.model_flops_per_token(2048), spec.forward_flops_per_token(2048)
    assert model == 3 * forward
    assert hardware_flops_per_token(spec, 2048, recompute="none") == model
    assert hardware_flops_per_token(spec, 2048, recompute="full") == model + forward - 2 * spec.vocab_size * spec.hidden
    core = 4 * 2048 * spec.hidden * spec.layers
    assert hardware_flops_per_token(spec, 2048, recompute="selective") == model + core


def test_megatron_flops_agree_with_their_closed_form() -> None:
    # 96 B s L h^2 (1 + s/6h + V/16Lh) per batch with full recompute (arXiv 2104.04473): the head counted 3 times there.
    spec, s = preset("gpt3-175b"), 2048
    h, layers, vocab = spec.hidden, spec.layers, spec.vocab_size
    theirs = 96 * layers * h * h * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert hardware_flops_per_token(spec, s, recompute="full") == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"preset": "lama-3m"}, "did you mean 'llama-3m'"),
        ({"hidden": 100, "heads": 3}, "hidden = 100 is not divisible by model.heads = 3"),
        ({"heads": 4, "kv_heads": 3}, "heads = 4 is not divisible by kv_heads = 3"),
        ({"vocab_size": 100}, "model.vocab_size = 100 is smaller than the tokenizer's 257"),
        ({"hidden": -1}, "greater than or equal to 1"),
    ],
)
def test_wrong_models_get_a_sentence(tree: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(ModelConfig, tree, "run.toml").resolve(257)


def test_the_vocabulary_comes_from_the_tokenizer_unless_given() -> None:
    assert ModelConfig(preset="llama-1m").resolve(2048).vocab_size == 2048
    assert ModelConfig(preset="llama-1m", vocab_size=4096).resolve(2048).vocab_size == 4096
