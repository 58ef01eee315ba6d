"""Between Hugging Face's `config.json` and a `ModelSpec`: the families, and what each way is refused. No torch.

Every key of a config is accounted for: it gives a shape, or must have a value that is supported, or has no effect on the
logits, so that no model is ever loaded as something it is not.

The planner's formulas know one kind of block. For them a model of another family stands in as a Llama of its width, depth,
heads, vocabulary and number of parameters: memory and bytes are those of so many parameters, and compute is that of so many
multiplied ones.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thinwire.config import explain
from thinwire.errors import ConfigError
from thinwire.hub import config_json as config_in
from thinwire.hub import config_json as config_out
from thinwire.hub.config_json import Limit, Read
from thinwire.hub.files import CONFIG, read_json
from thinwire.hub.init import HUB
from thinwire.hub.keys import Keys
from thinwire.hub.names import Held, corrected
from thinwire.model.config import LoraOptions
from thinwire.model.spec import ModelSpec
from thinwire.units import show_count

_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn": "intermediate_size",
    "tied": "tie_word_embeddings",
    "qkv_bias": "attention_bias",
    "ffn_bias": "mlp_bias",
}
_GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "ffn": "n_inner",
    "max_tokens": "n_positions",
    "tied": "tie_word_embeddings",
}
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


@dataclass(frozen=True)
class HubFamily:
    """One `model_type`: its class, how its config is read, and how a spec is written (or why it cannot be)."""

    model_type: str
    architecture: str
    read: Callable[[Keys], Read]
    refuse: Callable[[ModelSpec], str | None]
    write: Callable[[ModelSpec], dict[str, Any]]
    keys: Mapping[str, str] = field(default_factory=lambda: _LLAMA_KEYS)
    """Field of a spec -> key of the config, of what tensors show too."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names of keys that transformers accepts."""


@dataclass(frozen=True)
class Understood:
    """A folder's model; and in words, what of its config is left out of account or corrected by its tensors."""

    spec: ModelSpec
    notes: tuple[str, ...]


def read_spec(
    tree: Mapping[str, Any], source: str, *, ignored: Collection[str] = (), max_tokens: int | None = None
) -> ModelSpec:
    """The spec of a `config.json` alone; see `understand`."""
    return understand(tree, source, ignored=ignored, max_tokens=max_tokens).spec


def understand(
    tree: Mapping[str, Any],
    source: str,
    *,
    held: Held | None = None,
    ignored: Collection[str] = (),
    max_tokens: int | None = None,
) -> Understood:
    """The spec of a `config.json` and, where they say otherwise, of the tensors beside it.

    `max_tokens` shortens (or, for rotary positions, lengthens) its context. Raises ConfigError, naming it, for an
    architecture or key that is not supported.
    """
    family = family_of(tree, source)
    keys = Keys(tree, source, ignored=ignored, aliases=family.aliases)
    read = family.read(keys)
    notes = [f"nothing in a {family.model_type} model reads {key!r}: left out of account" for key in keys.finish()]
    shape = read.shape
    if held is not None:
        try:
            shape = corrected(shape, held, lambda name: keys.stated(family.keys.get(name, name)))
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        notes += _differences(family, keys, read.shape, shape)
    shape = {**shape, "max_tokens": _context(source, shape, max_tokens, read.limits)}
    try:
        return Understood(ModelSpec(**shape), tuple(f"{source}: {note}" for note in notes))
    except (ValidationError, TypeError) as error:
        said = explain(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{source} describes an impossible model: {said}") from None


def _differences(family: HubFamily, keys: Keys, said: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """One sentence for each key whose value the tensors contradict."""
    return [
        f"{key} = {_json(said[name])}, but the weights hold {_json(held[name])}: the weights count"
        for name, key in family.keys.items()
        if keys.stated(key) and said[name] != held[name]
    ]


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _context(source: str, shape: Mapping[str, Any], asked: int | None, limits: Sequence[Limit]) -> int:
    """How many positions the model gets. Raises ConfigError where they are more than it is computed exactly for."""
    tokens = shape["max_tokens"] if asked is None else asked
    if tokens > shape["max_tokens"] and shape["family"] == "gpt2":
        raise ConfigError(
            f"{source} has {shape['max_tokens']} learned positions; --max-tokens {tokens} is more than that"
        )
    for limit in limits:
        if limit.tokens < tokens:
            raise ConfigError(
                f"{source}: {limit.why}, which is not supported for {tokens} positions; --max-tokens {limit.tokens} keeps "
                f"to sequences on which it has no effect"
            )
    return int(tokens)


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


FAMILIES: Mapping[str, HubFamily] = {
    family.model_type: family
    for family in (
        HubFamily("llama", "LlamaForCausalLM", config_in.read_llama, config_out.refuse_llama, config_out.write_llama),
        HubFamily(
            "mistral", "MistralForCausalLM", config_in.read_mistral, config_out.refuse_mistral, config_out.write_mistral
        ),
        HubFamily("qwen2", "Qwen2ForCausalLM", config_in.read_qwen2, config_out.refuse_qwen2, config_out.write_qwen2),
        HubFamily("qwen3", "Qwen3ForCausalLM", config_in.read_qwen3, config_out.refuse_qwen3, config_out.write_qwen3),
        HubFamily(
            "gpt2", "GPT2LMHeadModel", config_in.read_gpt2, config_out.refuse_gpt2, config_out.write_gpt2,
            _GPT2_KEYS, _GPT2_ALIASES,
        ),
    )
}  # fmt: skip
"""In the order in which an export tries them."""


_HEAD = 64
"""Numbers of a head, of a model without attention: what a Llama's would be."""
_LORA = (
    "model.lora is not in the formulas: planned as if all weights were trained, which needs more memory, time and bytes"
)


def stand_in(folder: Path, *, kept: Path, lora: LoraOptions | None) -> tuple[ModelSpec, tuple[str, ...]]:
    """(the spec whose costs are planned, sentences on what is not in them). Torch is loaded for unknown families only.

    `kept`: the run folder, which remembers the config if `folder` is gone. Raises ConfigError if there is no config, if it
    is none that `train` takes, or if no Llama has as few parameters.
    """
    path = folder / CONFIG
    if not path.is_file() and (kept / HUB / CONFIG).is_file():
        path = kept / HUB / CONFIG
    adapters = () if lora is None else (_LORA,)
    try:
        return read_spec(read_json(path), str(path)), adapters
    except ConfigError:
        spec, note = _llama_like(folder, kept)
        return spec, (note, *adapters)


def _llama_like(folder: Path, kept: Path) -> tuple[ModelSpec, str]:
    from thinwire.hub.pretrained import describe

    native = describe(folder, kept=kept)
    text = _text_config(native.config)
    hidden, layers = (_size(text, name, folder) for name in ("hidden_size", "num_hidden_layers"))
    heads = getattr(text, "num_attention_heads", None) or max(1, hidden // _HEAD)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    shape: dict[str, Any] = {
        "vocab_size": native.vocab_size, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_size": head_size + head_size % 2, "max_tokens": native.max_tokens, "tied": native.tied,
    }  # fmt: skip
    narrow = ModelSpec(**shape, ffn=1)
    missing = native.parameters - narrow.parameters
    per_column = layers * 3 * hidden  # up and gate and down
    if missing < 0:
        raise ConfigError(
            f"{folder / CONFIG}: its {show_count(native.parameters)} parameters are fewer than those of a Llama of its "
            f"width ({show_count(narrow.parameters)}), so that it cannot be planned for; `train` runs it all the same"
        )
    spec = ModelSpec(**shape, ffn=1 + round(missing / per_column))
    sparse = ", as if each of them multiplied every token" if native.matmul_parameters is None else ""
    return spec, (
        f"model.hf is a {native.config.get('model_type')}, which the formulas do not know: planned as a Llama of its width "
        f"and depth with {show_count(spec.parameters)} parameters (it has {show_count(native.parameters)}){sparse}"
    )


def _text_config(tree: dict[str, Any]) -> Any:
    """The config as transformers sees it, which knows the families' own words for width and depth."""
    import transformers

    fields = {key: value for key, value in tree.items() if key not in ("model_type", "dtype", "torch_dtype")}
    return transformers.AutoConfig.for_model(str(tree["model_type"]), **fields).get_text_config()


def _size(text: Any, name: str, folder: Path) -> int:
    value = getattr(text, name, None)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{folder / CONFIG} says no {name}, so that it cannot be planned for; `train` runs it all the same"
        )
    return value
