"""A run folder to a model in this process, for evaluation and generation. Off the training path: no world."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinwire.checkpoint.config import CheckpointConfig
from thinwire.checkpoint.pieces import newest_whole, read_tensors, refuse_emulated
from thinwire.config import build, read_toml
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.errors import CheckpointError, ConfigError
from thinwire.hub.native_spec import AnySpec, NativeSpec, read_any_spec
from thinwire.model.generate import LanguageModel
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer


@dataclass(frozen=True)
class LoadedRun:
    """The model of a checkpoint, and the data section of its run file."""

    model: LanguageModel
    spec: AnySpec
    step: int
    data: DataConfig
    tokens: int
    """Tokens of a training sequence."""

    def corpus(self, path: Path | None = None) -> Corpus:
        """The run's corpus, or the one at `path`, with documents apart if the run's were. Raises DataError."""
        apart = False if self.data.cross_documents is False else None
        return Corpus.open(self.data if path is None else DataConfig(path=path, cross_documents=apart))


def device_for(asked: str | None) -> torch.device:
    """`cpu` or `cuda` as asked for; by default an accelerator if torch sees one. Raises ConfigError if it sees none."""
    seen = torch.cuda.is_available()
    if asked not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {asked!r} is unknown; there are cpu and cuda")
    if asked == "cuda" and not seen:
        raise ConfigError(f"torch {torch.__version__} sees no GPU on this machine; leave --device out, or give cpu")
    return torch.device(asked or ("cuda" if seen else "cpu"))


def load_run(
    folder: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> LoadedRun:
    """The newest whole checkpoint of the run in `folder`, or that of `step`, on `device`.

    Raises CheckpointError or ConfigError.
    """
    run_file = folder / "run.toml"
    if not run_file.is_file():
        raise CheckpointError(
            f"{folder} is no run folder: it has no run.toml; give the folder that `thinwire train` made"
        )
    tree = read_toml(run_file)
    refuse_emulated(tree, folder)
    verify = build(CheckpointConfig, tree.get("checkpoint", {}), f"{run_file}: checkpoint").verify
    data, tokens = build(DataConfig, tree.get("data", {}), f"{run_file}: data"), _tokens(tree, run_file)
    path, manifest = newest_whole(folder / "checkpoints", step=step, verify=verify)
    spec = read_any_spec(manifest.meta["spec"], str(path))
    state = {name: tensor.to(dtype) for name, tensor in read_tensors(path, manifest, "params/")}
    model = _native(spec, state, tree, device) if isinstance(spec, NativeSpec) else _own(spec, state).to(device)
    model.eval()
    return LoadedRun(model, spec, manifest.step, data, tokens)


def _tokens(tree: dict[str, Any], run_file: Path) -> int:
    """Of a training sequence. Raises ConfigError; a run file that thinwire wrote says it."""
    batch = tree.get("batch")
    tokens = batch.get("tokens") if isinstance(batch, dict) else None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 2:
        raise ConfigError(f"{run_file} does not say batch.tokens, a whole number above 1; put back what the run wrote")
    return tokens


def _own(spec: ModelSpec, state: dict[str, torch.Tensor]) -> Transformer:
    with torch.device("meta"):
        model = Transformer(spec)
    if spec.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    return model


def _native(
    spec: NativeSpec, state: dict[str, torch.Tensor], tree: dict[str, Any], device: torch.device
) -> LanguageModel:
    from thinwire.hub.pretrained import filled, with_adapters

    if spec.lora is not None:
        model = with_adapters(spec, Path(tree["model"]["hf"]), state.__getitem__)
    else:
        model = filled(spec, state.__getitem__, next(iter(state.values())).dtype)
    model.module.to(device)
    return model
