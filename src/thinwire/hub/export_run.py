"""A run's checkpoint to a Hugging Face folder: config, sharded safetensors, tokenizer, generation config, model card.

The card, README.md, is made of what the run says of itself.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.checkpoint.config import CheckpointConfig
from thinwire.checkpoint.pieces import TensorReader, newest_whole, refuse_emulated
from thinwire.config import build, read_toml
from thinwire.data.corpus import DataConfig
from thinwire.errors import CheckpointError, ConfigError
from thinwire.files.events import read_events, steps
from thinwire.files.folders import atomic_folder
from thinwire.hub.families import FAMILIES, write_config
from thinwire.hub.files import CONFIG, GENERATION, TOKENIZER, Precision, read_json, same_mode, write_json
from thinwire.hub.import_folder import split
from thinwire.hub.init import HUB
from thinwire.hub.names import recipes
from thinwire.hub.native_spec import AnySpec, NativeSpec, read_any_spec
from thinwire.hub.pretrained import write_adapters, write_native
from thinwire.hub.shards import DEFAULT_SHARD_BYTES, write_shards
from thinwire.hub.tokenizer_out import write_ends, write_tokenizer
from thinwire.model.spec import ModelSpec
from thinwire.units import show_count

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Card:
    """What an export knows of itself."""

    run: Path
    settings: Mapping[str, Any]
    """The run file."""
    step: int
    model_type: str
    parameters: int
    precision: str
    base: str | None
    """Where its first weights came from; None: they were drawn."""
    adapters: bool

    def write(self, folder: Path) -> None:
        """README.md, with the fields between `---` that model hubs read."""
        text = "\n".join([*self._head(), *self._words(folder), "", *self._table(), ""])
        (folder / CARD).write_text(text, encoding="utf-8")

    def _head(self) -> Iterator[str]:
        yield from ("---", f"library_name: {'peft' if self.adapters else 'transformers'}")
        yield from ("pipeline_tag: text-generation", "tags:", "- thinwire", *(["- lora"] if self.adapters else []))
        if self.base is not None:
            yield f"base_model: {json.dumps(self.base)}"
        yield "---"

    def _words(self, folder: Path) -> Iterator[str]:
        what = "Adapters for a" if self.adapters else "A"
        yield from ("", f"# {self.run.absolute().name}", "")
        yield (
            f"{what} {self.model_type} model of {show_count(self.parameters)} parameters, as it was after step "
            f"{self.step:,} of a run of thinwire, in {self.precision}."
        )
        if (folder / CONFIG).is_file():
            loaded = ["model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
            if (folder / TOKENIZER).is_file():
                loaded.append("tokenizer = AutoTokenizer.from_pretrained(FOLDER)")
            yield from (
                "",
                "```python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                *loaded,
                "```",
            )
        if (folder / GENERATION).is_file():
            ends = json.loads((folder / GENERATION).read_text(encoding="utf-8")).get("eos_token_id")
            if ends is not None:
                yield from (
                    "",
                    f"Generation ends at token id {' or '.join(map(str, ends if isinstance(ends, list) else [ends]))}.",
                )

    def _table(self) -> Iterator[str]:
        yield from ("| what | value |", "| --- | --- |")
        for name, value in self._figures():
            yield f"| {name} | {str(value).replace('|', '/')} |"

    def _figures(self) -> Iterator[tuple[str, Any]]:
        """Only what the run has said: a figure that is not there has no row."""
        yield "first weights", "drawn at random" if self.base is None else f"`{self.base}`"
        data, batch, run = (self.settings.get(section, {}) for section in ("data", "batch", "run"))
        yield "data", f"`{data.get('path')}`"
        yield "steps", f"{self.step:,} of {run.get('steps', self.step):,}"
        yield "batch", f"{batch.get('sequences')} sequences of {batch.get('tokens')} tokens"
        yield "peak learning rate", self.settings.get("optimizer", {}).get("lr")
        yield "seed", run.get("seed")
        yield from self._measured(self.run / _EVENTS)

    def _measured(self, log: Path) -> Iterator[tuple[str, Any]]:
        if not log.is_file():
            return
        done = {number: record for number, record in steps(log).items() if number <= self.step}
        if done:
            yield "tokens scored", f"{sum(record['tokens'] for record in done.values()):,}"
            scored = [record["loss"] for _, record in sorted(done.items()) if record["loss"] is not None]
            if scored:  # a step without a scored token has no loss
                yield "training loss of the last step", f"{float(scored[-1]):.4f}"
        evals = read_events(log, "eval")
        scored = [record for record in evals if record["step"] <= self.step and record["loss"] is not None]
        if scored:
            last = scored[-1]
            yield f"validation loss at step {last['step']:,}", f"{float(last['loss']):.4f}"
            yield "validation perplexity", f"{float(last['perplexity']):.2f}"
            if last.get("bits_per_byte") is not None:
                yield "validation bits per byte", f"{float(last['bits_per_byte']):.4f}"
            yield "validation tokens", f"{last['tokens']:,}"
        starts = list(read_events(log, "run_start"))
        if starts:
            yield "ranks", ", then ".join(dict.fromkeys(str(record["ranks"]) for record in starts))


@dataclass(frozen=True)
class Exported:
    """What was written."""

    step: int
    model_type: str
    parameters: int
    tokenizer: bool


def export_run(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    precision: Precision = "fp32",
    model_type: str | None = None,
    force: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Exported:
    """Write the newest whole checkpoint of `run`, or that of `step`, as the Hugging Face folder `out`.

    No more than one shard is in memory, except of a model that `transformers` built and writes itself. Raises
    CheckpointError if there is no such checkpoint, ConfigError if no family can hold the model or `out` exists (unless
    `force`) or cannot be written, DataError if its corpus is gone.
    """
    run_file = run / "run.toml"
    if not run_file.is_file():
        raise CheckpointError(f"{run} is no run folder: it has no run.toml; give the folder that `thinwire train` made")
    tree = read_toml(run_file)
    refuse_emulated(tree, run)
    data = build(DataConfig, tree.get("data", {}), str(run_file))
    verify = build(CheckpointConfig, tree.get("checkpoint", {}), str(run_file)).verify
    path, manifest = newest_whole(run / "checkpoints", step=step, verify=verify)
    spec = read_any_spec(manifest.meta["spec"], str(path))
    came_from = read_json(run / HUB / CONFIG) if (run / HUB / CONFIG).is_file() else {}
    config = _config(spec, model_type, came_from)
    reader, dtype = TensorReader(path, manifest), _DTYPES[precision]
    with atomic_folder(out, force=force) as folder:
        ends = write_tokenizer(folder, run / HUB, data)
        if isinstance(spec, NativeSpec):
            if spec.lora is not None:
                base = Path(tree["model"]["hf"])
                write_adapters(folder, spec, base.absolute(), lambda name: reader.read(f"params/{name}").to(dtype))
            else:
                write_native(folder, spec, lambda name: reader.read(f"params/{name}"), dtype, limit=shard_bytes)
        else:
            ids = {key: came_from.get(key) for key in _TOKEN_IDS} if ends is None or ends.same is not False else {}
            write_json(folder / CONFIG, {**config, **ids, "torch_dtype": str(dtype).removeprefix("torch.")})
            write_shards(folder, _tensors(reader, spec, dtype), _sizes(spec, dtype), limit=shard_bytes)
        write_ends(folder, run / HUB, ends)
        _card(run, tree, spec, manifest.step, config["model_type"], precision).write(folder)
        same_mode(folder)
    return Exported(manifest.step, config["model_type"], spec.parameters, ends is not None)


def _card(run: Path, tree: Mapping[str, Any], spec: AnySpec, step: int, model_type: str, precision: Precision) -> Card:
    model = tree.get("model", {})
    base = model.get("init") or model.get("hf")
    adapters = isinstance(spec, NativeSpec) and spec.lora is not None
    return Card(run, tree, step, model_type, spec.parameters, precision, base, adapters)


def _config(spec: AnySpec, model_type: str | None, came_from: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(spec, ModelSpec):
        config = write_config(spec, model_type=model_type or _kept_type(spec, came_from))
        if config["model_type"] != came_from.get("model_type"):
            return config
        for key in _WINDOWS:  # what the weights came with stays stated as it was: missing, null or a number
            config.pop(key, None)
        return {**config, **{key: came_from[key] for key in _WINDOWS if key in came_from}}
    if model_type not in (None, spec.config["model_type"]):
        raise ConfigError(
            f"a {spec.config['model_type']} model that is trained as it is cannot be exported as {model_type}"
        )
    return spec.config


def _kept_type(spec: ModelSpec, came_from: Mapping[str, Any]) -> str | None:
    """The family that the weights came from, if the spec still fits it."""
    family = FAMILIES.get(came_from.get("model_type", ""))
    return family.model_type if family is not None and family.refuse(spec) is None else None


def _tensors(reader: TensorReader, spec: ModelSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for recipe in recipes(spec):
        for name, tensor in split(recipe, reader.read(f"params/{recipe.name}")):
            yield name, tensor.to(dtype)


def _sizes(spec: ModelSpec, dtype: torch.dtype) -> dict[str, int]:
    return {
        part.name: torch.Size(recipe.part_shape(part)).numel() * dtype.itemsize
        for recipe in recipes(spec)
        for part in recipe.parts
    }


CARD, _EVENTS = "README.md", "events.jsonl"
