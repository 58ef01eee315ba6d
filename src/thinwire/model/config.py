"""`[model]` of a run file: a preset, spec fields, a preset with fields overridden, or imported weights. No torch."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from thinwire.config import Frozen, explain
from thinwire.errors import ConfigError
from thinwire.model.presets import preset
from thinwire.model.spec import Family, ModelSpec, RopeScaling


class ModelConfig(Frozen):
    """Fields left out come from the preset; `vocab_size` left out comes from the tokenizer."""

    init: Path | None = None
    """A folder that `thinwire import` made: the shapes and the first weights. No other key goes with it."""
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
    bias: bool | None = None
    qk_norm: bool | None = None
    init_std: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, data: Any) -> Any:
        """`init` says everything about the model."""
        if not isinstance(data, dict) or data.get("init") is None:
            return data
        others = [key for key, value in data.items() if key != "init" and value is not None]
        if others:
            raise ValueError(f"init = {str(data['init'])!r} gives the whole model; leave {others[0]} out")
        return {"init": data["init"], "preset": None}

    def resolve(self, tokenizer_vocab_size: int | None = None, *, imported: ModelSpec | None = None) -> ModelSpec:
        """The spec; with `init`, the `imported` one of that folder.

        Raises ConfigError: unknown preset, impossible shapes, a vocabulary smaller than the tokenizer's.
        """
        spec = imported or self._spec(tokenizer_vocab_size)
        if tokenizer_vocab_size is not None and spec.vocab_size < tokenizer_vocab_size:
            way_out = (
                "prepare the corpus with the tokenizer of the imported model (INIT/hub/tokenizer.json)"
                if imported
                else "leave model.vocab_size out to take the tokenizer's"
            )
            raise ConfigError(
                f"model.vocab_size = {spec.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; {way_out}"
            )
        return spec

    def _spec(self, tokenizer_vocab_size: int | None) -> ModelSpec:
        given = {
            name: value for name, value in self.model_dump(exclude={"preset", "init"}).items() if value is not None
        }
        base: dict[str, Any] = preset(self.preset).model_dump() if self.preset else {}
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


def _head_size(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ConfigError(
            f"model.hidden = {hidden} is not divisible by model.heads = {heads}; give model.head_size too"
        )
    return hidden // heads
