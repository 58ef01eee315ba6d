"""A run folder to a model in this process, for evaluation and generation. Off the training path: no world."""

from dataclasses import dataclass
from pathlib import Path

import torch

from thinwire.checkpoint.read import newest_whole, read_tensors
from thinwire.config import build, read_toml
from thinwire.data.config import DataConfig
from thinwire.data.corpus import Corpus
from thinwire.errors import CheckpointError
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer


@dataclass(frozen=True)
class LoadedRun:
    """The model of a checkpoint, and the data section of its run file."""

    model: Transformer
    spec: ModelSpec
    step: int
    data: DataConfig
    tokens: int
    """Tokens of a training sequence."""

    def corpus(self, path: Path | None = None) -> Corpus:
        """The run's corpus, or the one at `path`. Raises DataError."""
        return Corpus.open(
            self.data if path is None else DataConfig(path=path, cross_documents=self.data.cross_documents)
        )


def load_run(folder: Path, *, step: int | None = None, dtype: torch.dtype = torch.float32) -> LoadedRun:
    """The newest whole checkpoint of the run in `folder`, or that of `step`. Raises CheckpointError or ConfigError."""
    run_file = folder / "run.toml"
    if not run_file.is_file():
        raise CheckpointError(
            f"{folder} is no run folder: it has no run.toml; give the folder that `thinwire train` made"
        )
    tree = read_toml(run_file)
    path, manifest = newest_whole(folder / "checkpoints", step=step)
    spec = build(ModelSpec, manifest.meta["spec"], str(path))
    with torch.device("meta"):
        model = Transformer(spec)
    state = {name: tensor.to(dtype) for name, tensor in read_tensors(path, manifest, "params/")}
    if spec.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    data = build(DataConfig, tree["data"], str(run_file))
    return LoadedRun(model.eval(), spec, manifest.step, data, int(tree["batch"]["tokens"]))
