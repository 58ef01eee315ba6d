"""Models of `transformers`, with `peft` adapters or without: described, built, filled from a checkpoint, written."""

import contextlib
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import CheckpointError, ConfigError
from thinwire.hub.files import CONFIG, read_json
from thinwire.hub.init import HUB
from thinwire.hub.native import Native, transformers_library
from thinwire.hub.native_spec import NativeSpec
from thinwire.hub.shards import INDEX, SINGLE
from thinwire.model.config import LoraOptions

_ENDLESS = 1 << 20
"""Positions of a model whose config sets no limit."""
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_SAMPLE_BYTES = 1 << 20
_TASK = "CAUSAL_LM"


def describe(folder: Path, *, kept: Path | None = None, lora: LoraOptions | None = None) -> NativeSpec:
    """The spec of the model in `folder`; if that is gone, of what the run folder `kept` remembers of it.

    Raises ConfigError: no transformers, no config, a model type it does not know, no causal language model, or adapters
    for layers that it does not have or for weights that are not there.
    """
    if lora is not None and not _has_weights(folder):
        raise ConfigError(f"{folder} holds no safetensors weights; adapters need a base to be put on")
    path = folder / CONFIG
    if not path.is_file() and kept is not None and (kept / HUB / CONFIG).is_file():
        path = kept / HUB / CONFIG
    tree = read_json(path)
    if "auto_map" in tree:
        raise ConfigError(f"{path} asks for code of its own (auto_map); only models inside transformers are trained")
    with torch.device("meta"):
        model: Any = _from_config(tree, str(path))
    kept_buffers = [
        name for name in model.state_dict() if name not in dict(model.named_parameters(remove_duplicate=False))
    ]
    if kept_buffers:
        raise ConfigError(
            f"{path}: the model keeps state that is no parameter ({kept_buffers[0]}); it cannot be resumed"
        )
    text, written = model.config.get_text_config(), json.loads(model.config.to_json_string(use_diff=False))
    if lora is not None:
        with torch.device("meta"):
            model = adapted(model, lora)
    heads = getattr(text, "num_attention_heads", 0) or 0
    hidden = getattr(text, "hidden_size", 0) or 0
    head_size = getattr(text, "head_dim", None) or (hidden // heads if heads else 0)
    return NativeSpec(
        config=written,
        vocab_size=text.vocab_size,
        max_tokens=next((limit for name in _LIMITS if (limit := getattr(text, name, None))), _ENDLESS),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matmul_parameters=_matmul_parameters(model),
        attention_width=heads * head_size * (getattr(text, "num_hidden_layers", 0) or 0),
        lora=lora,
        base=None if lora is None else identity_of(folder),
    )


def build_native(spec: NativeSpec, folder: Path | None, *, seed: int) -> Native:
    """The model in fp32: the weights in `folder` if it has any, else drawn from `seed`, equal on every rank; adapters drawn.

    Raises CheckpointError if the weights there cannot be read or are not those of the model.
    """
    torch.manual_seed(seed)
    if folder is None or not _has_weights(folder):
        return Native(_from_config(spec.config, "the model's config"))
    model = _from_pretrained(folder)
    if spec.lora is not None:
        torch.manual_seed(seed)
        model = adapted(model, spec.lora)
    return Native(model)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def _from_pretrained(folder: Path) -> nn.Module:
    try:
        with _quiet():
            model, info = transformers_library().AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever a damaged file makes the library raise
        raise CheckpointError(f"transformers cannot load the weights in {folder}: {_line(error)}") from None
    if info["missing_keys"]:
        raise CheckpointError(f"the tensor {min(info['missing_keys'])!r} is missing in the weights of {folder}")
    return model  # type: ignore[no-any-return]


def with_adapters(spec: NativeSpec, folder: Path, weights: Callable[[str], Tensor]) -> Native:
    """The base in `folder` with the adapters of a checkpoint. Raises CheckpointError if it is another base."""
    if not _has_weights(folder) or identity_of(folder) != spec.base:
        raise CheckpointError(f"the adapters belong to other weights than those in {folder}; put their base back there")
    assert spec.lora is not None
    model = adapted(_from_pretrained(folder), spec.lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = weights(name)
    return Native(model)


def filled(spec: NativeSpec, weights: Callable[[str], Tensor], dtype: torch.dtype) -> Native:
    """The model with the weights of a checkpoint, asked for by the parameters' names; of tied ones only the first."""
    model = _from_config(spec.config, "the checkpoint's config")
    for name, parameter in model.named_parameters():
        parameter.data = weights(name).to(dtype)
    return Native(model)


def write_native(
    folder: Path, spec: NativeSpec, weights: Callable[[str], Tensor], dtype: torch.dtype, *, limit: int
) -> None:
    """Write config and weights of the model by transformers' own `save_pretrained`. The whole model is in memory."""
    model = filled(spec, weights, dtype).module
    with _quiet():
        model.save_pretrained(folder, max_shard_size=limit)  # type: ignore[operator]


def write_adapters(folder: Path, spec: NativeSpec, base: Path, weights: Callable[[str], Tensor]) -> None:
    """Write a checkpoint's adapters as a peft folder. The base's weights are neither read nor written."""
    assert spec.lora is not None
    with torch.device("meta"):
        model = adapted(_from_config(spec.config, "the checkpoint's config"), spec.lora)
    write_adapter(folder, model, base, weights)


def _from_config(tree: dict[str, Any], source: str) -> nn.Module:
    library = transformers_library()
    try:
        with _quiet():
            fields = {key: value for key, value in tree.items() if key not in ("model_type", "dtype", "torch_dtype")}
            config = library.AutoConfig.for_model(str(tree.get("model_type")), **fields)
            model: nn.Module = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # unknown types, missing or impossible keys: the library raises many kinds
        raise ConfigError(
            f"{source}: transformers {library.__version__} makes no model of it: {_line(error)}"
        ) from None
    return model


def _matmul_parameters(model: nn.Module) -> int | None:
    """Weights of linear layers, a tied head included; None if parameters other than those, lookups and norms exist."""
    from transformers.pytorch_utils import Conv1D

    counted, lookups = 0, set()
    known = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            counted += module.weight.numel()
            known.add(id(module.weight))
        elif isinstance(module, nn.Embedding):
            lookups.add(id(module.weight))
    others = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in known | lookups]
    return None if others else counted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library's own progress bars and notes left out: every rank would repeat them."""
    notes: Any = importlib.import_module("transformers.utils.logging")
    level, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        yield
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def adapted(model: nn.Module, options: LoraOptions) -> nn.Module:
    """`model` with its weights frozen and fresh adapters, drawn from torch's global generator.

    Raises ConfigError if peft is missing or no layer is called what `targets` says.
    """
    peft = _peft()
    targets = options.targets if isinstance(options.targets, str) else list(options.targets)
    try:
        with _no_warnings():
            config = peft.LoraConfig(
                r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets,
                task_type=_TASK, bias="none",
            )  # fmt: skip
            made: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"model.lora: {' '.join(str(error).split())[:300]}") from None
    return made


def write_adapter(folder: Path, model: nn.Module, base: Path, weights: Callable[[str], Tensor]) -> None:
    """Write the adapters of `model`, filled by the parameters' names, as a folder that `peft.PeftModel` loads."""
    for name in [name for name, parameter in model.named_parameters() if parameter.requires_grad]:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weights(name)))
    with _no_warnings():
        saved: Any = model
        saved.peft_config["default"].base_model_name_or_path = str(base)
        saved.save_pretrained(folder)


def identity_of(folder: Path) -> str:
    """Which base the adapters belong to: a digest of its config, and of the size and ends of every weight file."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, path.stat().st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "model.lora needs the peft library, which is not installed; pip install 'thinwire[hf]'"
        ) from None
    return peft


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Without peft's use of what transformers calls old, and its remark that the base's config is not to be found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
