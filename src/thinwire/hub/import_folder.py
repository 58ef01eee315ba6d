"""A Hugging Face folder to an INIT folder: checked by name and shape first, then copied tensor by tensor."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from thinwire.checkpoint.manifest import describe_files
from thinwire.errors import CheckpointError
from thinwire.files.folders import atomic_folder
from thinwire.hub.families import family_of, understand
from thinwire.hub.files import CONFIG, SIDE_FILES, copy_files, read_json, same_mode
from thinwire.hub.init import HUB, Init
from thinwire.hub.names import EMBEDDING, HEAD, Held, Recipe, TensorPart, full_names, recipes
from thinwire.hub.shards import DEFAULT_SHARD_BYTES, ShardReader, write_shards
from thinwire.model.spec import ModelSpec

_BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(bias|masked_bias))$")
"""Constants that older files carry."""


def import_folder(
    source: Path,
    out: Path,
    *,
    force: bool = False,
    ignored: Collection[str] = (),
    max_tokens: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Init:
    """Make the INIT folder `out` from the Hugging Face folder `source`; weights keep their precision.

    No more than one shard is in memory. Raises ConfigError for a config that is not supported or an `out` that exists
    (unless `force`) or cannot be written, CheckpointError for tensors that are missing, unknown or of another shape.
    """
    config = read_json(source / CONFIG)
    family_of(config, str(source / CONFIG))
    shards = ShardReader(source)
    held = Held(shards.shapes(), shards.same)
    found = understand(config, str(source / CONFIG), held=held, ignored=ignored, max_tokens=max_tokens)
    spec, reader = found.spec, Renamed(shards, found.spec)
    sizes = {recipe.name: reader.bytes(recipe) for recipe in recipes(spec)}
    reader.refuse_others()
    with atomic_folder(out, force=force) as folder:
        tensors = ((recipe.name, reader.read(recipe)) for recipe in recipes(spec))
        files = write_shards(folder, tensors, sizes, limit=shard_bytes)
        copy_files(source, folder / HUB, SIDE_FILES)
        init = Init(folder, spec, str(config["model_type"]), describe_files(folder, files))
        init.write()
        same_mode(folder)
    return Init(out, spec, init.model_type, init.files, found.notes)


class Renamed:
    """A Hugging Face folder's tensors under this project's names. Every method raises CheckpointError."""

    def __init__(self, reader: ShardReader, spec: ModelSpec) -> None:
        self._reader, self._spec = reader, spec
        self._names = full_names(reader.names, spec.family)
        self._wanted = {self._there(part) for recipe in recipes(spec) for part in recipe.parts}

    def bytes(self, recipe: Recipe) -> int:
        """Size of the parameter as it will be stored, once its parts are known to be there and to fit."""
        for part in recipe.parts:
            there = self._there(part)
            if there not in self._reader.names:
                way_out = (
                    "; if the embedding is the head, say tie_word_embeddings = true there" if there == HEAD else ""
                )
                raise CheckpointError(
                    f"the tensor {there!r} is missing in the weights; its config asks for it{way_out}"
                )
            shape, wanted = self._reader.shape(there), recipe.part_shape(part)
            if self._stored(part, recipe, shape) is None:
                raise CheckpointError(f"the tensor {there!r} is {shape} in the weights, by its config {wanted}")
        return torch.Size(recipe.shape).numel() * self._dtype(recipe).itemsize

    def read(self, recipe: Recipe) -> Tensor:
        """The parameter, put together from its parts."""
        tensors = []
        for part in recipe.parts:
            tensor = self._reader.read(self._there(part))
            rows = self._stored(part, recipe, tuple(tensor.shape))
            assert rows is not None
            tensors.append((tensor.t() if part.transposed else tensor)[:rows].to(self._dtype(recipe)))
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def refuse_others(self) -> None:
        """A tensor that no parameter is made of would be lost without a word."""
        for name in sorted(self._reader.names - self._wanted):
            if not (_BUFFERS.search(name) or (self._spec.tied and name == HEAD)):
                raise CheckpointError(f"the weights hold a tensor {name!r} that this architecture has no place for")

    def _stored(self, part: TensorPart, recipe: Recipe, shape: tuple[int, ...]) -> int | None:
        """How many rows of the stored tensor are used, or None if it does not fit: a context that was shortened leaves
        learned positions over."""
        wanted = recipe.part_shape(part)
        shortened = recipe.name == "positions.weight" and shape[1:] == wanted[1:] and shape[0] >= wanted[0]
        return part.rows if shape == wanted or shortened else None

    def _dtype(self, recipe: Recipe) -> torch.dtype:
        dtype = self._reader.dtype(self._there(recipe.parts[0]))
        for part in recipe.parts[1:]:
            dtype = torch.promote_types(dtype, self._reader.dtype(self._there(part)))
        return dtype

    def _there(self, part: TensorPart) -> str:
        if part.name == EMBEDDING[self._spec.family] and part.name not in self._names and self._spec.tied:
            return HEAD  # of two tied ones either may be stored
        return self._names.get(part.name, part.name)


def split(recipe: Recipe, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that a parameter is made of: the way back."""
    for part, rows in zip(recipe.parts, torch.split(tensor, [part.rows for part in recipe.parts]), strict=True):
        yield part.name, rows.t() if part.transposed else rows
