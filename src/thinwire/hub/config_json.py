"""Hugging Face's `config.json`, one function per family and direction, or why a family cannot hold a `ModelSpec`. No torch.

Defaults are those of the family's config class in transformers: a key that is missing has them, one that is null has not.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from thinwire.errors import ConfigError
from thinwire.hub.keys import Keys
from thinwire.model.spec import ModelSpec, RopeScaling

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Three names of one formula in transformers."""


@dataclass(frozen=True)
class Limit:
    """Up to `tokens` positions the model is computed exactly; `why` says what would have an effect beyond."""

    tokens: int
    why: str


@dataclass(frozen=True)
class Read:
    """Fields of a spec, and the limits within which they are the whole model."""

    shape: dict[str, Any]
    limits: tuple[Limit, ...] = ()


def _llama_like(
    keys: Keys,
    *,
    kv_heads: int | None,
    ffn: int,
    max_tokens: int,
    vocab_size: int = 32000,
    head_size: int | None = None,
) -> Read:
    """What Llama, Mistral, Qwen2 and Qwen3 have in common; the arguments are the family's defaults."""
    keys.must("hidden_act", ("silu", "swish"), "silu")
    keys.must("is_causal", (True,), True)
    hidden, heads = keys.whole("hidden_size", 4096), keys.whole("num_attention_heads", 32)
    most = keys.whole("max_position_embeddings", max_tokens)
    theta, scaling, limits = _rope(keys, most)
    shape = {
        "family": "llama",
        "vocab_size": keys.whole("vocab_size", vocab_size),
        "hidden": hidden,
        "layers": keys.whole("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": keys.whole_or_none("num_key_value_heads", kv_heads) or heads,
        "head_size": keys.whole_or_none("head_dim", head_size) or max(1, hidden // heads),
        "ffn": keys.whole("intermediate_size", ffn),
        "max_tokens": most,
        "tied": keys.flag("tie_word_embeddings", False),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": False,
        "out_bias": False,
        "ffn_bias": False,
        "init_std": keys.hint("initializer_range", 0.02),
    }
    return Read(shape, limits)


def _rope(keys: Keys, max_tokens: int) -> tuple[float, RopeScaling | None, tuple[Limit, ...]]:
    """Base and scaling, from `rope_scaling` if it says anything, else `rope_parameters` (transformers 5)."""
    old, new = keys.table("rope_scaling"), keys.table("rope_parameters")
    name, stated = ("rope_scaling", old) if old else ("rope_parameters", new)
    inside = Keys(stated, f"{keys.source}: {name}")
    theta = inside.number("rope_theta") if "rope_theta" in stated else keys.number("rope_theta", 10000.0)
    kind = next((value for key in ("rope_type", "type") if (value := inside.text(key))), "default")
    inside.must("partial_rotary_factor", (1.0, 1, None), None)
    for key, value in stated.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{keys.source}: {name}.{key} is of one kind of layer; only one for all layers is supported"
            )
    if kind == "default":
        return theta, None, ()
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=inside.number("factor")), ()
    if kind == "dynamic":
        inside.number("factor")
        return (
            theta,
            None,
            (Limit(max_tokens, f"{name} of rope_type 'dynamic' changes the angles beyond {max_tokens} positions"),),
        )
    if kind == "llama3":
        return theta, _llama3(keys, inside, max_tokens), ()
    raise ConfigError(
        f"{keys.source}: {name}.rope_type = {kind!r} is not supported, only default, linear, dynamic and llama3 are; "
        f"[model] hf = DIR trains such a model as it is"
    )


def _llama3(keys: Keys, inside: Keys, max_tokens: int) -> RopeScaling:
    """Llama 3.1's stretching: no factor has a default; the length stated outside the table counts before the one inside."""
    outside = "original_max_position_embeddings"
    return RopeScaling(
        kind="llama3",
        factor=inside.number("factor"),
        low_freq_factor=inside.number("low_freq_factor"),
        high_freq_factor=inside.number("high_freq_factor"),
        original_max_tokens=keys.whole_or_none(outside, None) or inside.whole(outside, max_tokens),
    )


def read_llama(keys: Keys) -> Read:
    attention, ffn = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    read = _llama_like(keys, kv_heads=None, ffn=11008, max_tokens=2048)
    return Read({**read.shape, "qkv_bias": attention, "out_bias": attention, "ffn_bias": ffn}, read.limits)


def read_mistral(keys: Keys) -> Read:
    read = _llama_like(keys, kv_heads=8, ffn=14336, max_tokens=131072)
    said = "is missing, which means 4096 for mistral," if not keys.has("sliding_window") else ""
    window, kinds = keys.whole_or_none("sliding_window", 4096), _kinds(keys)
    if kinds is not None and "sliding_attention" not in kinds:  # transformers reads such a model as a ministral
        window = None
    return Read(read.shape, (*read.limits, *_windows(window, said)))


def read_qwen2(keys: Keys) -> Read:
    read = _llama_like(keys, kv_heads=32, ffn=22016, max_tokens=32768, vocab_size=151936)
    return Read({**read.shape, "qkv_bias": True}, (*read.limits, *_qwen_windows(keys, read.shape["layers"])))


def read_qwen3(keys: Keys) -> Read:
    biases = keys.flag("attention_bias", False)
    read = _llama_like(keys, kv_heads=32, ffn=22016, max_tokens=32768, vocab_size=151936, head_size=128)
    shape = {**read.shape, "qk_norm": True, "qkv_bias": biases, "out_bias": biases}
    return Read(shape, (*read.limits, *_qwen_windows(keys, read.shape["layers"])))


def _qwen_windows(keys: Keys, layers: int) -> tuple[Limit, ...]:
    """Layers from `max_window_layers` on have the window, or those that `layer_types` says; without the switch none."""
    used, kinds = keys.flag("use_sliding_window", False), _kinds(keys)
    window = keys.whole_or_none("sliding_window", 4096) if used else None
    if kinds is not None and "sliding_attention" in kinds and window is None:
        raise ConfigError(
            f"{keys.source}: layer_types has 'sliding_attention', and "
            f"{'sliding_window is null' if used else 'use_sliding_window is not true'}: transformers cannot run that either"
        )
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return ()
    first = keys.count("max_window_layers", 28)
    return _windows(window, "") if kinds is not None or first < layers else ()


def _kinds(keys: Keys) -> list[str] | None:
    """`layer_types`, refused unless every layer has full or sliding attention."""
    kinds = keys.names("layer_types")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"{keys.source}: layer_types has {kind!r}; only full attention and sliding windows are known"
            )
    return kinds


def _windows(window: int | None, said: str) -> tuple[Limit, ...]:
    if window is None:
        return ()
    return (Limit(window, f"sliding_window {said or f'= {window}'} leaves out tokens farther than {window} back"),)


def read_gpt2(keys: Keys) -> Read:
    keys.must("activation_function", _TANH_GELU, "gelu_new")
    keys.must("scale_attn_weights", (True,), True)
    keys.must("scale_attn_by_inverse_layer_idx", (False, None), False)
    keys.must("add_cross_attention", (False, None), False)
    keys.must("is_causal", (True,), True)
    hidden, heads = keys.whole("n_embd", 768), keys.whole("n_head", 12)
    shape = {
        "family": "gpt2",
        "vocab_size": keys.whole("vocab_size", 50257),
        "hidden": hidden,
        "layers": keys.whole("n_layer", 12),
        "heads": heads,
        "kv_heads": heads,
        "head_size": max(1, hidden // heads),
        "ffn": keys.whole_or_none("n_inner", None) or 4 * hidden,
        "max_tokens": keys.whole("n_positions", 1024),
        "tied": keys.flag("tie_word_embeddings", True),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "bias": True,
        "init_std": keys.hint("initializer_range", 0.02),
    }
    return Read(shape)


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
