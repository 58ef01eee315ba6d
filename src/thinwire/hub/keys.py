"""The keys of a Hugging Face `config.json`, each taken as transformers takes it: missing, null and stated differ. No torch.

A key that is missing has the default of its family's config class; an explicit null means none, where there can be none.
What no reader took is read by no model of that family, so it cannot change logits and is left out of account; unless
other families compute with a key of that name, when somebody meant something by it: that is refused.
"""

from collections.abc import Collection, Mapping
from typing import Any

from thinwire.errors import ConfigError

_WITHOUT_EFFECT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "attn_pdrop", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id", "dtype",
    "embd_pdrop", "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "max_window_layers", "model_type", "n_ctx", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "reorder_and_upcast_attn",
    "resid_pdrop", "return_dict", "rope_scaling", "rope_theta", "sep_token_id", "sliding_window", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "unk_token_id", "use_bfloat16", "use_cache", "use_sliding_window",
})  # fmt: skip
"""Keys that every model knows and that, once its reader has taken its own, change nothing between tokens and logits."""

_COMPUTED_WITH = frozenset({
    "alibi", "apply_residual_connection_post_layernorm", "attention_chunk_size", "attention_in_multiplier",
    "attention_k_eq_v", "attention_logit_cap", "attention_multiplier", "attention_out_multiplier",
    "attention_value_scale", "attn_config", "attn_logit_softcapping", "attn_scale", "attn_temperature_tuning", "auto_map",
    "block_configs", "clip_qkv", "compression_config", "embedding_multiplier", "embedding_scale",
    "final_logit_softcapping", "gate_soft_cap", "key_multiplier", "layer_rope_theta", "lm_head_multiplier",
    "local_attention", "logit_scale", "logits_scaling", "logits_soft_cap", "mlp_multipliers", "mup_enabled",
    "no_rope_layers", "num_kv_shared_layers", "output_logit_soft_cap", "parallel_attn", "partial_rotary_factor",
    "per_layer_config", "pruned_heads", "quantization_config", "query_pre_attn_scalar", "residual_multiplier",
    "residual_scale", "residual_weight", "rope_interleave", "rope_interleaved", "rotary_dim", "rotary_pct", "scale_depth",
    "scale_emb", "scale_embedding", "sliding_window_pattern", "swiglu_limit", "use_alibi", "use_bidirectional_attention",
    "use_parallel_residual", "width_scale",
})  # fmt: skip
"""Keys of which tensors show nothing and that some language model computes with, but none of ours: scales, caps, other
attention, other code."""

_MISSING = object()


class Keys:
    """The keys of one config, taken one by one. Every method raises ConfigError naming the key."""

    def __init__(
        self,
        tree: Mapping[str, Any],
        source: str,
        *,
        ignored: Collection[str] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        for key in ignored:
            if key not in tree:
                raise ConfigError(f"{source} has no key {key!r}, so --ignore {key} has nothing to leave out; drop it")
        self.source, self._ignored = source, frozenset(ignored)
        self._left = dict(tree)
        for alias, key in (aliases or {}).items():
            if alias in self._left:  # as transformers does, after the key itself
                self._left[key] = self._left.pop(alias)
        self._stated = dict(self._left)

    def has(self, key: str) -> bool:
        """Whether the config has `key`, null or not, and it is to be taken into account."""
        return key in self._stated and key not in self._ignored

    def stated(self, key: str) -> bool:
        """Whether the config says anything but null for `key`."""
        return self._stated.get(key) is not None

    def whole(self, key: str, default: int) -> int:
        """A size."""
        return self._size(key, self._take(key, default))

    def whole_or_none(self, key: str, default: int | None) -> int | None:
        """A size that null takes away, and so does leaving it out of account."""
        value = self._take(key, default)
        return None if value is None or key in self._ignored else self._size(key, value)

    def _size(self, key: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; without a default it has to be there."""
        value = self._take(key, default)
        if value is None and key not in self._stated:
            raise ConfigError(f"{self.source} has no key {key!r}, which has no default")
        if not _positive(value):
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def hint(self, key: str, default: float) -> float:
        """A number above 0 of which no logit depends: the default where it is anything else."""
        value = self._take(key, default)
        return float(value) if _positive(value) else default

    def count(self, key: str, default: int) -> int:
        """A whole number of 0 or more."""
        value = self._take(key, default)
        if type(value) is not int or value < 0:
            raise self._wrong(key, value, "a whole number of 0 or more")
        return value

    def text(self, key: str) -> str | None:
        """A name, or None where it is missing or null."""
        value = self._take(key, None)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, value, "a name")

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null is false."""
        value = self._take(key, default)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(key, value, "true or false")

    def names(self, key: str) -> list[str] | None:
        """A list of texts, or None where it is missing or null."""
        value = self._take(key, None)
        if value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            return value
        raise self._wrong(key, value, "a list of names")

    def table(self, key: str) -> dict[str, Any]:
        """A JSON object; empty where it is missing or null."""
        value = self._take(key, None)
        if value is None or isinstance(value, dict):
            return dict(value or {})
        raise self._wrong(key, value, "a JSON object")

    def must(self, key: str, wanted: Collection[Any], default: Any) -> None:
        """Refuse any value but the `wanted` ones."""
        value = self._take(key, default)
        if key not in self._ignored and not any(
            value is one or (value == one and type(value) is type(one)) for one in wanted
        ):
            shown = " and ".join(_shown(one) for one in wanted) + (" is" if len(wanted) == 1 else " are")
            raise ConfigError(
                f"{self.source}: {key} = {_shown(value)} is not supported, only {shown}; [model] hf = DIR trains such a "
                f"model as it is"
            )

    def finish(self) -> list[str]:
        """The keys that are left and that nothing reads. Raises ConfigError for the first one that models compute with."""
        unknown = []
        for key, value in self._left.items():
            if key in self._ignored or key in _WITHOUT_EFFECT:
                continue
            if key not in _COMPUTED_WITH:
                unknown.append(key)
            elif value is True or (value and value != 1):  # off, nothing, or a factor of one
                raise ConfigError(
                    f"{self.source}: the key {key!r} (= {_shown(value)}) is not supported; if it does not change the logits,"
                    f" leave it out of account with --ignore {key}"
                )
        return unknown

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, _MISSING)
        return default if value is _MISSING or key in self._ignored else value

    def _wrong(self, key: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} = {_shown(value)} is not {wanted}")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]
