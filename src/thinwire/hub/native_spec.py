"""What a run needs to know of a `transformers` model that it trains as it is. No torch to read one."""

from typing import Any

from thinwire.config import Frozen, build
from thinwire.model.config import LoraOptions
from thinwire.model.spec import ModelSpec


class NativeSpec(Frozen):
    """A model by its Hugging Face config, and the counts that `transformers` gave for it."""

    config: dict[str, Any]
    """The whole of `config.json`: with a checkpoint it is enough to build the model again."""
    vocab_size: int
    max_tokens: int
    parameters: int
    matmul_parameters: int | None
    """Parameters that multiply every token; None if the model has others than linear layers (experts)."""
    attention_width: int
    """heads x head size, summed over layers."""
    lora: LoraOptions | None = None
    base: str | None = None
    """With adapters: which weights they belong to."""

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    def model_flops_per_token(self, tokens: int) -> float | None:
        """FLOPs of forward and backward per token, as `ModelSpec` counts them; None if they are not known.

        Of frozen weights there is no gradient: with adapters backward costs what forward does.
        """
        if self.matmul_parameters is None:
            return None
        forward = 2.0 * self.matmul_parameters + 4.0 * tokens * self.attention_width
        return forward * (3.0 if self.lora is None else 2.0)


AnySpec = ModelSpec | NativeSpec


def read_any_spec(tree: dict[str, Any], source: str) -> AnySpec:
    """The spec that a checkpoint's meta holds. Raises ConfigError."""
    return build(NativeSpec, tree, source) if "config" in tree else build(ModelSpec, tree, source)
