"""A `transformers` causal language model behind the calls that the loop makes; the model itself is untouched.

Documents are kept apart by positions that start again at 0: transformers' masks see packed sequences by them.
"""

import contextlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import CheckpointError, ConfigError
from thinwire.hub.adapters import adapted, identity_of, write_adapter
from thinwire.hub.files import CONFIG, read_json
from thinwire.hub.init import HUB
from thinwire.hub.native_spec import NativeSpec
from thinwire.hub.shards import INDEX, SINGLE
from thinwire.model.config import LoraOptions
from thinwire.model.loss import linear_loss, token_loss

_ENDLESS = 1 << 20
"""Positions of a model whose config sets no limit."""
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class Native:
    """tokens (B, T) -> logits (B, T, V), or with targets (B, T) -> the sum of token losses, by a transformers model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        inner = getattr(module, "get_base_model", lambda: module)()
        self._positions = "position_ids" in inspect.signature(inner.forward).parameters
        self._head = plain_head(module)
        """The layer whose output the logits are; None if the model makes them in another way."""

    def __call__(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Raises ConfigError if documents are to be kept apart and the model takes no positions."""
        extra: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if positions_BT is not None:
            if not self._positions:
                raise ConfigError(
                    f"{type(self.module).__name__} takes no position_ids, so documents cannot be kept apart; set "
                    f"data.cross_documents = true, or train a model that takes them (conversations are always kept apart)"
                )
            extra["position_ids"] = positions_BT
        call = partial(self.module, input_ids=tokens_BT, use_cache=cache is not None, **extra)
        if targets_BT is None:
            return call().logits  # type: ignore[no-any-return]
        if self._head is None:
            return token_loss(call().logits, targets_BT)
        with _losing(self._head, targets_BT):
            return call().logits  # type: ignore[no-any-return]

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def train(self, mode: bool = True) -> "Native":
        self.module.train(mode)
        return self

    def eval(self) -> "Native":
        return self.train(False)

    def new_cache(self) -> Any:
        return _transformers().DynamicCache()


def plain_head(module: nn.Module) -> nn.Linear | None:
    """The linear layer whose output is what the model returns as logits, found by running two tokens.

    None if there is none, or if something is done to its output (scaled or capped logits, say).
    """
    inner = getattr(module, "get_base_model", lambda: module)()
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or head.weight.is_meta or "forward" in vars(head):
        return None
    tokens_12 = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda head, args, out: made.append(out))
    training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(input_ids=tokens_12, use_cache=False).logits
    finally:
        hook.remove()
        module.train(training)
    return head if len(made) == 1 and logits is made[0] and logits.shape[:2] == tokens_12.shape else None


@contextlib.contextmanager
def _losing(head: nn.Linear, targets_BT: Tensor) -> Iterator[None]:
    """Inside, the head gives the loss where it gave logits: in its own forward, where its weights are at hand."""
    head.forward = lambda x_BTD: linear_loss(x_BTD, head.weight, targets_BT, head.bias)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


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
            model, info = _transformers().AutoModelForCausalLM.from_pretrained(
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
    library = _transformers()
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


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "model.hf needs the transformers library, which is not installed; pip install 'thinwire[hf]'"
        ) from None
    return transformers


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
