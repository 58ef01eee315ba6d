"""`[model] hf = DIR`: a transformers model trained as it is, with the same plan, checkpoints and exports."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MambaConfig,
    PhiConfig,
    PreTrainedConfig,
)

from hub_models import CONFIGS, logits, make_model, save_model, tokens
from runs import make_corpus, run_tree, train_in
from thinwire.errors import ConfigError, ThinwireError
from thinwire.evaluate.load import load_run
from thinwire.files.events import steps
from thinwire.hub.export_run import export_run
from thinwire.hub.families import read_spec
from thinwire.hub.import_folder import import_folder
from thinwire.hub.native import Native
from thinwire.hub.pretrained import build_native, describe
from thinwire.model.loss import token_loss
from thinwire.train.folder import EVENTS_FILE
from worlds import run_world


def losses(folder: Path, corpus: Path, model: dict[str, str], levels: list[int], **sections: Any) -> list[float]:
    sections = {"run": {"steps": 5}, "schedule": {"warmup_steps": 1}, **sections}
    tree = run_tree(folder, corpus, cluster={"levels": levels}, **sections)
    tree["model"] = model
    run_world(levels, train_in, tree)
    return [record["loss"] for record in steps(folder / EVENTS_FILE).values()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), tokenizer="bpe:300")


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks are of no family of our own: partly rotated heads, parallel attention and feed-forward."""
    folder = tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["qwen3-biases", "llama-3"])
@pytest.mark.parametrize("documents", [True, False], ids=["across", "apart"])
def test_it_trains_like_our_own_model_with_the_same_weights(
    name: str, documents: bool, corpus: Path, tmp_path: Path
) -> None:
    save_model(name, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "init")
    data = {"data": {"path": str(corpus), "cross_documents": documents}}
    own = losses(tmp_path / "own", corpus, {"init": str(tmp_path / "init")}, [1], **data)
    theirs = losses(tmp_path / "theirs", corpus, {"hf": str(tmp_path / "hf")}, [2], **data, plan={"partition": "zero3"})
    assert theirs == pytest.approx(own, rel=2e-5)


def test_a_model_of_another_kind_trains_resumes_and_exports(phi: Path, corpus: Path, tmp_path: Path) -> None:
    """Cut at two levels with recomputed blocks; resumed after its folder is gone; scored and exported."""
    shutil.copytree(phi, tmp_path / "hf")
    model = {"hf": str(tmp_path / "hf")}
    plan = {"partition": {"params": "node", "grads": "node", "optimizer": "cluster"}, "recompute": "full"}
    plain = losses(tmp_path / "plain", corpus, model, [1], run={"steps": 8}, checkpoint={"every_steps": 5})
    cut = losses(tmp_path / "cut", corpus, model, [2, 2], plan=plan, run={"steps": 8}, checkpoint={"every_steps": 5})
    assert cut == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0]
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000008")
    again = losses(tmp_path / "cut", corpus, model, [2], plan={"partition": "zero1"}, run={"steps": 8})
    assert again == pytest.approx(plain, rel=1e-5)
    export_run(tmp_path / "cut", tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = load_run(tmp_path / "cut").model
    assert isinstance(own, Native)
    torch.testing.assert_close(logits(back), logits(own.module), atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match="a phi model that is trained as it is cannot be exported as llama"):
        export_run(tmp_path / "cut", tmp_path / "other", model_type="llama")


def test_a_config_without_weights_starts_from_drawn_ones_equal_on_all_ranks(phi: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    shutil.copy(phi / "config.json", tmp_path / "hf")
    spec = describe(tmp_path / "hf")
    one, same, other = (build_native(spec, tmp_path / "hf", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one.module), logits(same.module))
    assert not torch.equal(logits(one.module), logits(other.module))


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_our_own_spec(name: str, tmp_path: Path) -> None:
    make_model(name).config.save_pretrained(tmp_path)
    native = describe(tmp_path)
    own = read_spec(native.config, "config.json")
    assert (native.parameters, native.vocab_size, native.max_tokens) == (own.parameters, own.vocab_size, own.max_tokens)
    assert native.model_flops_per_token(32) == own.model_flops_per_token(32)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"model_type": "nothing"}', "makes no model of it"),
        ("{}", "makes no model of it"),
        ('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "asks for code of its own (auto_map)"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "makes no model of it"),
    ],
)
def test_a_model_that_transformers_does_not_make_is_refused(config: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError) as caught:
        describe(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_or_partial_weights_are_refused(phi: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(phi, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights, spec = load_file(file), describe(tmp_path / "hf")
    weights.pop("model.layers.0.mlp.fc1.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ThinwireError, match=r"'model.layers.0.mlp.fc1.weight' is missing"):
        build_native(spec, tmp_path / "hf", seed=0)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ThinwireError, match="transformers cannot load the weights"):
        build_native(spec, tmp_path / "hf", seed=0)


SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS: dict[str, tuple[PreTrainedConfig, bool]] = {
    "plain": (CONFIGS["llama-3"], True),
    "tied": (CONFIGS["qwen2-tied"], True),
    "with a bias": (PhiConfig(**{**SMALL, "num_key_value_heads": 4}), True),
    "in fp32 whatever the model": (
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
        True,
    ),
    "capped": (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0), False),
    "scaled": (CohereConfig(**SMALL, logit_scale=0.25), False),
    "divided": (GraniteConfig(**SMALL, logits_scaling=3.0), False),
}
"""Configs, and whether the head's output is the logits."""


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore:The fast path is not available")
def test_the_loss_and_its_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    config, fused = HEADS[name]
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    native, targets = Native(module), torch.randint(0, 300, (2, 48))
    targets[0, 5:9] = -100
    assert (native._head is not None) == fused
    expected = token_loss(module(input_ids=tokens()).logits, targets)
    made = native(tokens(), targets)
    assert made.shape == ()
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=0)
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for one, other in zip(*(torch.autograd.grad(each, wanted) for each in (made, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert native(tokens()).shape == (2, 48, 300)  # and logits again where there are no targets
