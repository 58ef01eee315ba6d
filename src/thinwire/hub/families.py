"""Between Hugging Face's `config.json` and a `ModelSpec`, one function each way per family. No torch.

Every key of a config is accounted for: it gives a shape, or must have one value, or has no effect on the logits. A key
that is none of these is refused by name, so that no model is ever loaded as something it is not.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from thinwire.config import explain
from thinwire.errors import ConfigError
from thinwire.model.spec import ModelSpec, RopeScaling

_WITHOUT_EFFECT = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "attn_pdrop", "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "max_window_layers", "model_type",
    "n_ctx", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "resid_pdrop", "return_dict", "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "unk_token_id", "use_bfloat16", "use_cache",
})  # fmt: skip
"""Keys that say nothing about the function from tokens to logits outside training."""


class Keys:
    """The keys of a config file, taken one by one; what nobody took is refused. Every method raises ConfigError."""

    def __init__(self, tree: Mapping[str, Any], source: str, ignored: Collection[str] = ()) -> None:
        self._left = {key: value for key, value in tree.items() if key not in _WITHOUT_EFFECT and key not in ignored}
        self.source = source

    def take(self, key: str, default: Any) -> Any:
        """The value, or `default` if the key is missing or null."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def need(self, key: str) -> int:
        """A size, which has no default worth guessing."""
        value = self.take(key, None)
        if value is None:
            raise ConfigError(f"{self.source} has no key {key!r}; the model's shape is not known without it")
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.source}: {key} = {value!r} is not a whole number above 0")
        return value

    def must(self, key: str, wanted: Any, default: Any) -> None:
        """Refuse any value but `wanted`."""
        value = self.take(key, default)
        if value != wanted:
            raise ConfigError(f"{self.source}: {key} = {value!r} is not supported, only {wanted!r} is")

    def finish(self) -> None:
        """Refuse the first key that is left and switched on (null and false are off)."""
        for key, value in self._left.items():
            if value is not None and value is not False:
                raise ConfigError(
                    f"{self.source}: the key {key!r} (= {str(value)[:60]}) is not supported; if it does not change the "
                    f"logits, leave it out of account with --ignore {key}"
                )


@dataclass(frozen=True)
class HubFamily:
    """One `model_type`: its class, how its config is read, and how a spec is written (or why it cannot be)."""

    model_type: str
    architecture: str
    read: Callable[[Keys], dict[str, Any]]
    refuse: Callable[[ModelSpec], str | None]
    write: Callable[[ModelSpec], dict[str, Any]]


def read_spec(
    tree: Mapping[str, Any], source: str, *, ignored: Collection[str] = (), max_tokens: int | None = None
) -> ModelSpec:
    """The spec of a `config.json`; `max_tokens` shortens (or, for rotary positions, lengthens) its context.

    Raises ConfigError, naming it, for an architecture or key that is not supported, or one that is missing.
    """
    keys = Keys(tree, source, ignored)
    shape = family_of(tree, source).read(keys)
    keys.finish()
    window = shape.pop("window", None)
    if max_tokens is not None:
        if max_tokens > shape["max_tokens"] and shape["family"] == "gpt2":
            raise ConfigError(
                f"{source} has {shape['max_tokens']} learned positions; --max-tokens {max_tokens} is more than that"
            )
        shape["max_tokens"] = max_tokens
    if window is not None and window < shape["max_tokens"]:
        raise ConfigError(
            f"{source}: sliding_window = {window} is shorter than the {shape['max_tokens']} positions, and sliding windows "
            f"are not supported; --max-tokens {window} keeps to sequences on which the window has no effect"
        )
    try:
        return ModelSpec(**shape)
    except (ValidationError, TypeError) as error:
        said = explain(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{source} describes an impossible model: {said}") from None


def family_of(tree: Mapping[str, Any], source: str) -> HubFamily:
    """The family that a config names. Raises ConfigError with the families there are."""
    name = tree.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        named = "names no model_type" if name is None else f"is of model_type {name!r}, which is not supported"
        raise ConfigError(
            f"{source} {named}; there are {', '.join(FAMILIES)}, and [model] hf = DIR trains any other as it is"
        )
    return FAMILIES[name]


def write_config(spec: ModelSpec, *, model_type: str | None = None) -> dict[str, Any]:
    """The `config.json` of a spec: as `model_type`, or the first family that can hold it.

    Raises ConfigError saying why it cannot be one.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise ConfigError(f"there is no family {model_type!r} to export to; there are {', '.join(FAMILIES)}")
    chosen = FAMILIES.values() if model_type is None else [FAMILIES[model_type]]
    reasons = []
    for family in chosen:
        why = family.refuse(spec)
        if why is None:
            head = {"architectures": [family.architecture], "model_type": family.model_type}
            return {**head, **family.write(spec), "tie_word_embeddings": spec.tied, "vocab_size": spec.vocab_size}
        reasons.append(f"not {family.model_type}: {why}")
    raise ConfigError(f"no Hugging Face family can hold this model ({'; '.join(reasons)})")


def _llama_like(keys: Keys) -> dict[str, Any]:
    """What Llama, Mistral, Qwen2 and Qwen3 have in common."""
    keys.must("hidden_act", "silu", "silu")
    hidden, heads = keys.need("hidden_size"), keys.need("num_attention_heads")
    theta, scaling = _rope(keys)
    return {
        "family": "llama",
        "vocab_size": keys.need("vocab_size"),
        "hidden": hidden,
        "layers": keys.need("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.take("num_key_value_heads", heads),
        "head_size": keys.take("head_dim", hidden // heads),
        "ffn": keys.need("intermediate_size"),
        "max_tokens": keys.need("max_position_embeddings"),
        "tied": keys.take("tie_word_embeddings", False),
        "norm_eps": keys.take("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": keys.take("initializer_range", 0.02),
    }


def _rope(keys: Keys) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    stated = {**keys.take("rope_parameters", {}), **keys.take("rope_scaling", {})}
    theta = float(keys.take("rope_theta", 10000.0))
    theta = float(stated.pop("rope_theta", None) or theta)
    named = [stated.pop("rope_type", None), stated.pop("type", None)]
    kind = next((name for name in named if name), "default")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling(kind="linear", factor=_figure(stated, "factor", keys.source))
    elif kind == "llama3":
        scaling = RopeScaling(
            kind="llama3",
            factor=_figure(stated, "factor", keys.source),
            low_freq_factor=_figure(stated, "low_freq_factor", keys.source),
            high_freq_factor=_figure(stated, "high_freq_factor", keys.source),
            original_max_tokens=int(_figure(stated, "original_max_position_embeddings", keys.source)),
        )
    else:
        raise ConfigError(f"{keys.source}: rope_type {kind!r} is not supported; there are default, linear and llama3")
    if stated.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{keys.source}: partial_rotary_factor is not supported: all of a head is rotated here")
    rest = [key for key, value in stated.items() if value is not None and kind != "default"]
    if rest:
        raise ConfigError(f"{keys.source}: rope_scaling.{rest[0]} is not supported with rope_type {kind!r}")
    return theta, scaling


def _figure(stated: dict[str, Any], key: str, source: str) -> float:
    value = stated.pop(key, None)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{source}: rope_scaling.{key} = {value!r} is not a positive number")
    return float(value)


def _read_llama(keys: Keys) -> dict[str, Any]:
    attention, ffn = keys.take("attention_bias", False), keys.take("mlp_bias", False)
    if ffn and not attention:
        raise ConfigError(f"{keys.source}: mlp_bias without attention_bias is not supported")
    biases = {"qkv_bias": attention, "out_bias": attention, "bias": ffn}
    return {**_llama_like(keys), **biases}


def _read_mistral(keys: Keys) -> dict[str, Any]:
    return {**_llama_like(keys), "window": keys.take("sliding_window", None)}


def _read_qwen2(keys: Keys) -> dict[str, Any]:
    _no_windows(keys)
    return {**_llama_like(keys), "qkv_bias": True}


def _read_qwen3(keys: Keys) -> dict[str, Any]:
    _no_windows(keys)
    biases = keys.take("attention_bias", False)
    head_size = keys.take("head_dim", 128)
    return {**_llama_like(keys), "head_size": head_size, "qk_norm": True, "qkv_bias": biases, "out_bias": biases}


def _no_windows(keys: Keys) -> None:
    keys.must("use_sliding_window", False, False)
    keys.take("sliding_window", None)
    if any(kind != "full_attention" for kind in keys.take("layer_types", [])):
        raise ConfigError(f"{keys.source}: layer_types other than 'full_attention' are not supported")


def _read_gpt2(keys: Keys) -> dict[str, Any]:
    keys.must("activation_function", "gelu_new", "gelu_new")
    keys.must("scale_attn_weights", True, True)
    keys.must("scale_attn_by_inverse_layer_idx", False, False)
    keys.must("add_cross_attention", False, False)
    keys.take("reorder_and_upcast_attn", False)
    hidden, heads = keys.need("n_embd"), keys.need("n_head")
    return {
        "family": "gpt2",
        "vocab_size": keys.need("vocab_size"),
        "hidden": hidden,
        "layers": keys.need("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": hidden // heads,
        "ffn": keys.take("n_inner", 4 * hidden),
        "max_tokens": keys.need("n_positions"),
        "tied": keys.take("tie_word_embeddings", True),
        "norm_eps": keys.take("layer_norm_epsilon", 1e-5),
        "bias": True,
        "init_std": keys.take("initializer_range", 0.02),
    }


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


def _write_llama(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "attention_bias": _biased(spec)[0], "mlp_bias": spec.bias}


def _write_mistral(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "sliding_window": None}


def _write_qwen2(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "use_sliding_window": False}


def _write_qwen3(spec: ModelSpec) -> dict[str, Any]:
    return {**_write_llama_like(spec), "attention_bias": _biased(spec)[0], "use_sliding_window": False}


def _write_gpt2(spec: ModelSpec) -> dict[str, Any]:
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
    return spec.qkv_bias or spec.bias, spec.out_bias or spec.bias, spec.bias


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


_NONE, _QKV, _ATTENTION, _ALL = (
    (False, False, False), (True, False, False), (True, True, False), (True, True, True),
)  # fmt: skip


def _refuse_llama(spec: ModelSpec) -> str | None:
    if spec.hidden % spec.heads:
        return f"hidden = {spec.hidden} is not divisible by heads = {spec.heads}"
    return _refuse_llama_like(spec, qk_norm=False, biases=(_NONE, _ATTENTION, _ALL))


def _refuse_mistral(spec: ModelSpec) -> str | None:
    return _refuse_llama_like(spec, qk_norm=False, biases=(_NONE,))


def _refuse_qwen2(spec: ModelSpec) -> str | None:
    return _refuse_llama_like(spec, qk_norm=False, biases=(_QKV,))


def _refuse_qwen3(spec: ModelSpec) -> str | None:
    return _refuse_llama_like(spec, qk_norm=True, biases=(_NONE, _ATTENTION))


def _refuse_gpt2(spec: ModelSpec) -> str | None:
    if spec.family != "gpt2":
        return f"the model is of the {spec.family} family"
    if spec.heads != spec.kv_heads or spec.heads * spec.head_size != spec.hidden:
        return "kv_heads must be heads, and head_size hidden / heads"
    return "it needs biases everywhere and no qk_norm" if not spec.bias or spec.qk_norm else None


FAMILIES: Mapping[str, HubFamily] = {
    family.model_type: family
    for family in (
        HubFamily("llama", "LlamaForCausalLM", _read_llama, _refuse_llama, _write_llama),
        HubFamily("mistral", "MistralForCausalLM", _read_mistral, _refuse_mistral, _write_mistral),
        HubFamily("qwen2", "Qwen2ForCausalLM", _read_qwen2, _refuse_qwen2, _write_qwen2),
        HubFamily("qwen3", "Qwen3ForCausalLM", _read_qwen3, _refuse_qwen3, _write_qwen3),
        HubFamily("gpt2", "GPT2LMHeadModel", _read_gpt2, _refuse_gpt2, _write_gpt2),
    )
}
"""In the order in which an export tries them."""
