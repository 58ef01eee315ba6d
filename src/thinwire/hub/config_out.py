"""A `ModelSpec` as the `config.json` of each family, or why that family cannot hold it. No torch."""

from collections.abc import Collection
from typing import Any

from thinwire.model.spec import ModelSpec, RopeScaling


def _write_llama_like(spec: ModelSpec) -> dict[str, Any]:
    scaling = _write_scaling(spec.rope_scaling)
    return {
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_size,
        "intermediate_size": spec.ffn,
        "max_position_embeddings": spec.max_tokens,
        "rms_norm_eps": spec.norm_eps,
        "initializer_range": spec.init_std,
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": spec.rope_theta},
    }


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_tokens,
    }


def write_llama(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "attention_bias": _biased(spec)[0], "mlp_bias": _biased(spec)[2]}


def write_mistral(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "sliding_window": None}


def write_qwen2(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "use_sliding_window": False}


def write_qwen3(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "attention_bias": _biased(spec)[0], "use_sliding_window": False}


def write_gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "n_embd": spec.hidden,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_inner": spec.ffn,
        "n_positions": spec.max_tokens,
        "layer_norm_epsilon": spec.norm_eps,
        "initializer_range": spec.init_std,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _biased(spec: ModelSpec) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values, attention's output, and the feed-forward layers have biases."""
    return spec.qkv_bias or spec.bias, spec.out_bias or spec.bias, spec.ffn_bias or spec.bias


def _refuse_llama_like(spec: ModelSpec, *, qk_norm: bool, biases: Collection[tuple[bool, bool, bool]]) -> str | None:
    if spec.family != "llama":
        return f"the model is of the {spec.family} family"
    if spec.qk_norm != qk_norm:
        return f"qk_norm = {str(spec.qk_norm).lower()}"
    if _biased(spec) not in biases:
        shown = ", ".join(
            name for name, has in zip(("q, k and v", "attention output", "ffn"), _biased(spec), strict=True) if has
        )
        return f"biases in {shown or 'no layer'}"
    return None


_NONE, _QKV, _ATTENTION, _FFN, _ALL = (
    (False, False, False), (True, False, False), (True, True, False), (False, False, True), (True, True, True),
)  # fmt: skip


def refuse_llama(spec: ModelSpec) -> str | None:
    if spec.hidden % spec.heads:
        return f"hidden = {spec.hidden} is not divisible by heads = {spec.heads}"
    return _refuse_llama_like(spec, qk_norm=False, biases=(_NONE, _ATTENTION, _FFN, _ALL))


def refuse_mistral(spec: ModelSpec) -> str | None:
    return _refuse_llama_like(spec, qk_norm=False, biases=(_NONE,))


def refuse_qwen2(spec: ModelSpec) -> str | None:
    return _refuse_llama_like(spec, qk_norm=False, biases=(_QKV,))


def refuse_qwen3(spec: ModelSpec) -> str | None:
    return _refuse_llama_like(spec, qk_norm=True, biases=(_NONE, _ATTENTION))


def refuse_gpt2(spec: ModelSpec) -> str | None:
    if spec.family != "gpt2":
        return f"the model is of the {spec.family} family"
    if spec.heads != spec.kv_heads or spec.heads * spec.head_size != spec.hidden:
        return "kv_heads must be heads, and head_size hidden / heads"
    return "it needs biases everywhere and no qk_norm" if not spec.bias or spec.qk_norm else None
