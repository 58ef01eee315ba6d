"""Models by their public names, from 1M to 405B parameters. Each row's source stands beside it."""

from typing import Any

from thinwire.config import nearest
from thinwire.errors import ConfigError
from thinwire.model.spec import ModelSpec, RopeScaling

_LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0)


def _llama(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, max_tokens: int, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn,
        "head_size": hidden // heads, "max_tokens": max_tokens, **more,
    }  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int, vocab: int = 50257, max_tokens: int = 1024) -> dict[str, Any]:
    shape = _llama(vocab, hidden, layers, heads, heads, 4 * hidden, max_tokens)
    return {"family": "gpt2", "tied": True, "bias": True, **shape}


_PRESETS: dict[str, dict[str, Any]] = {
    # Small ones of this project, for laptops and tests; vocabularies are usually replaced by the tokenizer's.
    "llama-1m": _llama(257, 128, 4, 4, 2, 384, 1024, tied=True),
    "llama-3m": _llama(257, 256, 4, 4, 2, 640, 1024, tied=True),
    "llama-11m": _llama(257, 384, 6, 6, 6, 1024, 1024, tied=True),
    "llama-30m": _llama(4096, 512, 8, 8, 4, 1536, 2048, tied=True),
    "llama-110m": _llama(32000, 768, 12, 12, 12, 2048, 2048, tied=True),
    "gpt2-1m": {**_gpt2(128, 4, 4, vocab=257), "max_tokens": 512},
    # OpenAI's GPT-2 release: config.json of gpt2, -medium, -large, -xl.
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # Megatron-LM, arXiv 2104.04473 table 1 and GPT-3, arXiv 2005.14165 table 2.1 (175B).
    "gpt3-175b": _gpt2(12288, 96, 96, vocab=51200, max_tokens=2048),
    "megatron-22b": _gpt2(6144, 48, 64, vocab=51200, max_tokens=2048),
    "megatron-530b": _gpt2(20480, 105, 128, vocab=51200, max_tokens=2048),
    # arXiv 2401.02385, config.json of TinyLlama-1.1B.
    "tinyllama-1.1b": _llama(32000, 2048, 22, 32, 4, 5632, 2048),
    # arXiv 2307.09288, config.json of Llama-2-7b/13b/70b-hf.
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 8, 28672, 4096),
    # arXiv 2407.21783 table 3, config.json of Meta-Llama-3-8B/70B and Llama-3.1-405B, Llama-3.2-1B.
    "llama-3.2-1b": _llama(128256, 2048, 16, 32, 8, 8192, 131072, tied=True, rope_theta=5e5,
                           rope_scaling=RopeScaling(kind="llama3", factor=32.0)),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=5e5),
    "llama-3-70b": _llama(128256, 8192, 80, 64, 8, 28672, 8192, rope_theta=5e5),
    "llama-3.1-405b": _llama(128256, 16384, 126, 128, 8, 53248, 131072, rope_theta=5e5, rope_scaling=_LLAMA3_SCALING),
    # arXiv 2310.06825, config.json of Mistral-7B-v0.3 (v0.1 has 32000 tokens).
    "mistral-7b": _llama(32000, 4096, 32, 32, 8, 14336, 32768, rope_theta=1e6),
    # arXiv 2412.15115, config.json of Qwen2.5-0.5B/7B.
    "qwen2.5-0.5b": _llama(151936, 896, 24, 14, 2, 4864, 32768, tied=True, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen2.5-7b": _llama(152064, 3584, 28, 28, 4, 18944, 131072, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    # arXiv 2505.09388, config.json of Qwen3-8B.
    "qwen3-8b": _llama(151936, 4096, 36, 32, 8, 12288, 40960, qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
}  # fmt: skip


def preset_names() -> tuple[str, ...]:
    return tuple(_PRESETS)


def preset(name: str) -> ModelSpec:
    """The model called `name`. Raises ConfigError with the nearest name there is."""
    if name not in _PRESETS:
        raise ConfigError(f"there is no model preset {name!r}{nearest(name, list(_PRESETS))}")
    return ModelSpec(**_PRESETS[name])
