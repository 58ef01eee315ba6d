"""What a folder holds beats its config; a key that is missing, null or stated means what it means in transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub_models import CONFIGS, logits, save_model, tokens
from thinwire.errors import ConfigError, ThinwireError
from thinwire.hub.families import FAMILIES
from thinwire.hub.import_folder import import_folder
from thinwire.hub.init import Init
from thinwire.hub.shards import ShardReader
from thinwire.model.transformer import Transformer

Change = Callable[[dict[str, torch.Tensor]], None]


def own_logits(init: Init) -> torch.Tensor:
    """(2, 48, V), by our model with the weights of INIT."""
    model, reader = Transformer(init.spec), ShardReader(init.folder)
    model.load_state_dict({name: reader.read(name) for name in init.spec.parameter_shapes()}, strict=False)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(tokens())
    return out


def their_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))


def restate(folder: Path, **keys: Any) -> None:
    """Set keys of the config; `...` takes one away."""
    path = folder / "config.json"
    tree = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


def reweigh(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "keys", "field", "says"),
    [
        ("llama-2", {"vocab_size": 299}, ("vocab_size", 300), "vocab_size = 299, but the weights hold 300"),
        ("llama-2", {"hidden_size": 64, "head_dim": 8}, ("hidden", 32), "hidden_size = 64, but the weights hold 32"),
        ("llama-2", {"intermediate_size": 40}, ("ffn", 48), "intermediate_size = 40, but the weights hold 48"),
        ("llama-2", {"num_hidden_layers": 5}, ("layers", 2), "num_hidden_layers = 5, but the weights hold 2"),
        ("llama-2", {"num_hidden_layers": 1}, ("layers", 2), "num_hidden_layers = 1, but the weights hold 2"),
        ("llama-2", {"num_key_value_heads": 4}, ("kv_heads", 2), "num_key_value_heads = 4, but the weights hold 2"),
        ("llama-3", {"head_dim": ...}, ("head_size", 16), None),
        ("llama-attention-bias", {"attention_bias": ...}, ("out_bias", True), None),
        ("llama-all-biases", {"mlp_bias": False}, ("ffn_bias", True), "mlp_bias = false, but the weights hold true"),
        ("llama-2", {"attention_bias": True}, ("qkv_bias", False), "attention_bias = true, but the weights hold false"),
        ("llama-2", {"tie_word_embeddings": True}, ("tied", False), "tie_word_embeddings = true, but the weights"),
        ("qwen3", {"head_dim": 8}, ("head_size", 16), "head_dim = 8, but the weights hold 16"),
        ("qwen3", {"num_attention_heads": 8}, ("heads", 4), "num_attention_heads = 8, but the weights hold 4"),
        ("gpt2", {"n_positions": 16}, ("max_tokens", 64), "n_positions = 16, but the weights hold 64"),
        ("gpt2-untied", {"n_inner": ..., "tie_word_embeddings": ...}, ("ffn", 80), None),
        ("gpt2-untied", {"tie_word_embeddings": ...}, ("tied", False), None),
    ],
)
def test_what_the_weights_hold_counts_and_is_said(
    name: str, keys: dict[str, Any], field: tuple[str, Any], says: str | None, tmp_path: Path
) -> None:
    """The logits are those of the model that was saved, whatever its config was changed to."""
    theirs = save_model(name, tmp_path / "hf")
    restate(tmp_path / "hf", **keys)
    init = import_folder(tmp_path / "hf", tmp_path / "init")
    assert getattr(init.spec, field[0]) == field[1]
    assert (says is None and not init.notes) or (says is not None and any(says in note for note in init.notes))
    torch.testing.assert_close(own_logits(init), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied-linear", "gpt2"])
def test_a_tied_head_may_be_stored_too_and_one_of_its_own_is_kept(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "hf")
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    reweigh(tmp_path / "hf", lambda held: held.update({"lm_head.weight": held[embedding].clone()}))
    assert import_folder(tmp_path / "hf", tmp_path / "same").spec.tied
    reweigh(tmp_path / "hf", lambda held: held["lm_head.weight"].mul_(1.5))
    init = import_folder(tmp_path / "hf", tmp_path / "init")
    assert not init.spec.tied
    torch.testing.assert_close(own_logits(init), their_logits(tmp_path / "hf"), atol=1e-5, rtol=1e-5)


def test_of_two_tied_tensors_either_may_be_stored(tmp_path: Path) -> None:
    theirs = save_model("llama-tied-linear", tmp_path / "hf")
    reweigh(tmp_path / "hf", lambda held: held.update({"lm_head.weight": held.pop("model.embed_tokens.weight")}))
    init = import_folder(tmp_path / "hf", tmp_path / "init")
    torch.testing.assert_close(own_logits(init), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_head_that_is_nowhere_is_asked_for(tmp_path: Path) -> None:
    save_model("llama-2", tmp_path / "hf")
    reweigh(tmp_path / "hf", lambda held: held.__delitem__("lm_head.weight"))
    with pytest.raises(ThinwireError, match="say tie_word_embeddings = true there"):
        import_folder(tmp_path / "hf", tmp_path / "init")


def test_a_window_that_is_missing_is_the_familys_and_null_is_none(tmp_path: Path) -> None:
    """Mistral without the key has 4096 in transformers."""
    save_model("mistral", tmp_path / "hf")
    restate(tmp_path / "hf", sliding_window=..., max_position_embeddings=8192)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.sliding_window == 4096
    with pytest.raises(ConfigError, match=r"sliding_window is missing, which means 4096 .* --max-tokens 4096 keeps"):
        import_folder(tmp_path / "hf", tmp_path / "init")
    assert import_folder(tmp_path / "hf", tmp_path / "short", max_tokens=4096).spec.max_tokens == 4096
    assert import_folder(tmp_path / "hf", tmp_path / "ignored", ignored=["max_position_embeddings"], max_tokens=64)
    restate(tmp_path / "hf", sliding_window=None)
    assert import_folder(tmp_path / "hf", tmp_path / "none").spec.max_tokens == 8192


VALUES: dict[str, list[Any]] = {
    "rope_scaling": [
        None, {}, {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0}, {"type": "yarn", "factor": 2.0},
        {"rope_type": "default", "rope_theta": 500.0, "factor": 9.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"type": "linear", "factor": 2.0, "rope_theta": 500.0, "mscale": 3.0},
    ],
    "original_max_position_embeddings": [8, 16],
    "rope_theta": [500.0, 1],
    "layer_types": [None, ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]],
    "sliding_window": [None, 4, 48, 4096],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2, 28],
    "rms_norm_eps": [1e-5, 0.5],
    "layer_norm_epsilon": [1e-6, 0.5],
    "hidden_act": ["silu", "swish", "relu", "gelu"],
    "activation_function": ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu", "relu"],
    "is_causal": [True, False, None],
    "scale_attn_weights": [True, False],
    "scale_attn_by_inverse_layer_idx": [True, False],
    "reorder_and_upcast_attn": [True, False],
    "initializer_range": [0.0, 0.5],
    "attention_dropout": [0.3],
    "pretraining_tp": [2],
    "use_cache": [False, True],
    "mystery": [True, 3, "x"],
}  # fmt: skip
"""Values for keys of configs; what must not matter in one family matters in another."""


@pytest.mark.parametrize("name", ["llama-3", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_key_is_honoured_refused_or_without_effect_exactly_as_transformers_reads_it(
    name: str, tmp_path: Path
) -> None:
    """Whatever a key says, the import has the logits that transformers has, or names the key; and where transformers has
    the logits that it had without the key, nothing is refused."""
    base = logits(save_model(name, tmp_path / "hf"))
    whole, compared = (tmp_path / "hf" / "config.json").read_text(), 0
    for key, values in VALUES.items():
        for value in values:
            (tmp_path / "hf" / "config.json").write_text(whole)
            together = (
                {"use_sliding_window": True} if key in ("sliding_window", "max_window_layers", "layer_types") else {}
            )
            restate(tmp_path / "hf", **together, **{key: value})
            try:
                theirs = their_logits(tmp_path / "hf")
            except Exception:
                theirs = None  # transformers refuses such a config
            try:
                ours = own_logits(import_folder(tmp_path / "hf", tmp_path / "init", force=True))
            except ConfigError as error:
                assert key in str(error) or set(together) & set(str(error).split()), (key, value, str(error))
                window = "leaves out tokens farther" in str(error)  # of positions that these sequences do not reach
                assert theirs is None or window or not torch.equal(theirs, base), (key, value, str(error))
                continue
            if theirs is not None:
                assert torch.allclose(ours, theirs, atol=3e-5, rtol=0), (key, value)
                compared += 1
    assert compared >= 20


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_the_familys_config_knows_is_accounted_for(family: str) -> None:
    """None of them is told as one that nothing reads."""
    from thinwire.hub.families import understand

    name = next(name for name, config in CONFIGS.items() if config.model_type == family)
    tree = json.loads(CONFIGS[name].to_json_string(use_diff=False))
    assert understand(tree, "config.json").notes == ()
