"""Documents kept apart in a transformers model: tried once, refused before anything is written where they see each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runs import make_corpus, thinwire, write_run
from thinwire.errors import ConfigError
from thinwire.hub.native import Native, crosses

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {"mamba_d_state": 4, "mamba_expand": 2}
MODELS: dict[str, tuple[bool, dict[str, Any]]] = {
    "llama": (False, {}),
    "gpt2": (False, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "phi": (False, {}),
    "gemma3_text": (False, {"head_dim": 8}),
    "mixtral": (False, {"num_local_experts": 2}),
    "falcon": (True, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": (True, {"ffn_dim": 32, "word_embed_proj_dim": 32}),
    "jamba": (True, {**MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}),
    "granitemoehybrid": (
        True,
        {
            **MAMBA, "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8,
            "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16,
        },
    ),
}  # fmt: skip
"""Model types, and whether documents see each other in them."""


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**SHAPE, **MODELS[name][1]})
    )
    return model


@pytest.mark.parametrize("name", MODELS)
def test_it_is_found_which_models_let_documents_see_each_other(name: str) -> None:
    module = make(name).train()
    assert crosses(Native(module), 300) == MODELS[name][0]
    assert module.training


def test_one_that_takes_no_positions_says_so() -> None:
    with pytest.raises(ConfigError, match="takes no position_ids"):
        crosses(Native(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **SHAPE))), 300)


def test_a_run_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    make("falcon").save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    run = write_run(
        tmp_path, make_corpus(tmp_path, tokenizer="bpe:300"), run={"steps": 1}, schedule={"warmup_steps": 0}
    )
    text = run.read_text().split("[data]")[1]
    run.write_text(f'[model]\nhf = "{tmp_path / "hf"}"\n\n[data]\ncross_documents = false\n{text}')
    done = thinwire("train", run)
    assert done.returncode == 2, done.stderr
    assert "FalconForCausalLM lets a document see the one before it" in done.stderr
    assert "set data.cross_documents = true" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    allowed = thinwire("train", run, "--set", "data.cross_documents=true")
    assert allowed.returncode == 0, allowed.stderr
