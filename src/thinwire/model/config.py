"""`[model]` of a run file: a preset, spec fields, a preset with fields overridden, or imported weights. No torch.

`[model.lora]` puts low-rank adapters on a frozen model (LoRA, arXiv 2106.09685).
"""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from thinwire.config import Frozen, explain
from thinwire.errors import ConfigError
from thinwire.model.presets import preset
from thinwire.model.spec import Family, ModelSpec, RopeScaling


class LoraOptions(Frozen):
    """Adapters of rank `rank`, scaled by alpha / rank, on the linear layers named in `targets`."""

    rank: int = Field(default=16, ge=1, le=10**5)
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    """Ends of module names, such as `["q_proj", "v_proj"]`, or `all-linear`: every linear layer but the head."""


class ModelConfig(Frozen):
    """Fields left out come from the preset; `vocab_size` left out comes from the tokenizer."""

    init: Path | None = None
    """A folder that `thinwire import` made: the shapes and the first weights. No other key goes with it."""
    hf: Path | None = None
    """A Hugging Face folder whose model `transformers` builds and that is trained as it is. No other key goes with it."""
    lora: LoraOptions | None = None
    """With `hf`: train adapters on the frozen model instead of the model."""
    preset: str | None = "llama-3m"
    family: Family | None = None
    vocab_size: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_size: int | None = Field(default=None, ge=1)
    ffn: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    tied: bool | None = None
    norm_eps: float | None = Field(default=None, gt=0)
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    ffn_bias: bool | None = None
    bias: bool | None = None
    qk_norm: bool | None = None
    init_std: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, data: Any) -> Any:
        """`init` or `hf` says everything about the model."""
        alone = next((key for key in ("init", "hf") if isinstance(data, dict) and data.get(key) is not None), None)
        if alone is None:
            if isinstance(data, dict) and data.get("lora") is not None:
                raise ValueError("lora goes with hf = DIR, the model that the adapters are put on")
            return data
        kept = ("hf", "lora") if alone == "hf" else (alone,)
        others = [key for key, value in data.items() if key not in kept and value is not None]
        if "lora" in others:
            raise ValueError(
                f"init = {str(data[alone])!r} is trained whole, and lora puts adapters on a frozen model; write hf = DIR, "
                f"the Hugging Face folder itself, in the place of init, or leave lora out"
            )
        if others:
            raise ValueError(f"{alone} = {str(data[alone])!r} gives the whole model; leave {others[0]} out")
        return {**{key: data[key] for key in kept if key in data}, "preset": None}

    def resolve(self, tokenizer_vocab_size: int | None = None) -> ModelSpec:
        """The spec. Raises ConfigError: unknown preset, impossible shapes, a vocabulary smaller than the tokenizer's."""
        spec = self._spec(tokenizer_vocab_size)
        check_vocabulary(spec.vocab_size, tokenizer_vocab_size, "leave model.vocab_size out to take the tokenizer's")
        return spec

    def _spec(self, tokenizer_vocab_size: int | None) -> ModelSpec:
        base: dict[str, Any] = preset(self.preset).model_dump() if self.preset else {}
        given = {
            name: value
            for name, value in self.model_dump(exclude={"preset", "init", "hf", "lora"}).items()
            if value is not None and base.get(name) != value  # a preset's own value says nothing new
        }
        if self.vocab_size is None and tokenizer_vocab_size is not None:
            given["vocab_size"] = tokenizer_vocab_size
        if "head_size" not in given and ("hidden" in given or "heads" in given):
            fields = {**base, **given}
            if fields.get("hidden") and fields.get("heads"):
                given["head_size"] = _head_size(fields["hidden"], fields["heads"])
        if "heads" in given and "kv_heads" not in given:
            given["kv_heads"] = given["heads"]
        try:
            return ModelSpec(**{**base, **given})
        except ValidationError as error:
            raise ConfigError(f"model.{explain(error)}") from None


def check_vocabulary(vocab_size: int, tokenizer_vocab_size: int | None, way_out: str) -> None:
    """Raise ConfigError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer_vocab_size is not None and vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size = {vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; {way_out}"
        )


def _head_size(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ConfigError(
            f"model.hidden = {hidden} is not divisible by model.heads = {heads}; give model.head_size too"
        )
    return hidden // heads
