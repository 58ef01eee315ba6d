"""What the planner plans for in place of a Hugging Face model: its own shapes where they are known, else a Llama's.

The formulas of costs speak of one kind of block. A model of a family that they do not know is taken for a Llama of its
width, depth, heads, vocabulary and number of parameters: memory and bytes are those of so many parameters, and compute is
that of so many multiplied ones.
"""

from pathlib import Path
from typing import Any

from thinwire.errors import ConfigError
from thinwire.hub.families import read_spec
from thinwire.hub.files import CONFIG, read_json
from thinwire.hub.init import HUB
from thinwire.model.config import LoraOptions
from thinwire.model.spec import ModelSpec
from thinwire.units import show_count

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
    from thinwire.hub.native import describe

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
