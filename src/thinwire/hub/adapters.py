"""Adapters through `peft`: put on a model, known by their base, written as a peft adapter folder."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.hub.files import CONFIG
from thinwire.model.config import LoraOptions

_SAMPLE_BYTES = 1 << 20
_TASK = "CAUSAL_LM"


def adapted(model: nn.Module, options: LoraOptions) -> nn.Module:
    """`model` with its weights frozen and fresh adapters, drawn from torch's global generator.

    Raises ConfigError if peft is missing or no layer is called what `targets` says.
    """
    peft = _peft()
    targets = options.targets if isinstance(options.targets, str) else list(options.targets)
    try:
        with _quiet():
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
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's use of what transformers calls old, and its remark that the base's config is not to be found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
