"""Tiny randomly initialised models of each family, built and saved by `transformers` itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY, POSITIONS = 300, 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-2": LlamaConfig(**_SHAPE),
    "llama-3": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3, head_dim=16),
    "llama-tied-linear": LlamaConfig(
        **_SHAPE,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "llama-attention-bias": LlamaConfig(**_SHAPE, attention_bias=True),
    "llama-all-biases": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_SHAPE, head_dim=12, sliding_window=POSITIONS),
    "qwen2": Qwen2Config(**_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-tied": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16),
    "qwen3-biases": Qwen3Config(**_SHAPE, head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2-untied": GPT2Config(**_GPT2, tie_word_embeddings=False, n_inner=80, layer_norm_epsilon=1e-6),
}


def make_model(name: str) -> PreTrainedModel:
    """The model of `CONFIGS[name]`, its norms and biases made random too, so that a mix-up of any two would show."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_model(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    """Make the model and save it as `folder`."""
    model = make_model(name)
    model.save_pretrained(folder, **options)
    return model


def tokens() -> torch.Tensor:
    """(2, 48) ids."""
    return torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> torch.Tensor:
    """(2, 48, V) logits of `tokens` by a transformers model in eval mode."""
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=tokens(), use_cache=False).logits
    return out
