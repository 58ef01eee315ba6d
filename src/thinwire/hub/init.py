"""An INIT folder: the weights a run starts from, in this project's names and layout, in the precision they came in.

`init.json` holds the spec and a digest of every file; the weights are safetensors shards, from which each rank reads
only the elements that it owns; `hub/` keeps the config, tokenizer and generation files of where the weights came from.
This file needs no torch until weights are read.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from thinwire.checkpoint.manifest import FileInfo, digest
from thinwire.config import explain, read_json
from thinwire.errors import CheckpointError
from thinwire.hub.files import SIDE_FILES, copy_files
from thinwire.model.spec import ModelSpec

if TYPE_CHECKING:
    from thinwire.parallel.shard.layout import Piece

INIT_FILE, HUB, FORMAT = "init.json", "hub", 1


class _Written(BaseModel):
    """What is read of `init.json`; more may stand there."""

    spec: ModelSpec
    model_type: str
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class Init:
    """What `init.json` says."""

    folder: Path
    spec: ModelSpec
    model_type: str
    files: dict[str, FileInfo]
    notes: tuple[str, ...] = ()
    """What an import has to say of the folder it came from; not kept."""

    def write(self) -> None:
        tree = {
            "format": FORMAT,
            "model_type": self.model_type,
            "spec": self.spec.model_dump(mode="json"),
            "files": {name: asdict(info) for name, info in self.files.items()},
        }
        (self.folder / INIT_FILE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read_init(folder: Path, *, kept: Path | None = None) -> Init:
    """What the INIT folder says; if it is gone, what the run folder `kept` remembers of it.

    Raises CheckpointError if `folder` is not one that `thinwire import` of this format made.
    """
    path = folder / INIT_FILE
    if not path.is_file() and kept is not None and (kept / HUB / INIT_FILE).is_file():
        path = kept / HUB / INIT_FILE
    way_out = f"make it with `thinwire import DIR -o {folder}`"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {INIT_FILE}; {way_out}")
    tree = read_json(path, error=CheckpointError, way_out=way_out)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}, which this version reads; {way_out}")
    try:
        found = _Written.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error)}; {way_out}") from None
    return Init(folder, found.spec, found.model_type, found.files)


def keep_beside(init: Init, run: Path) -> None:
    """Copy the small files of `init` into the run folder, so that the run can be resumed and exported without it."""
    if (init.folder / INIT_FILE).is_file():
        copy_files(init.folder / HUB, run / HUB, SIDE_FILES)
        copy_files(init.folder, run / HUB, (INIT_FILE,))


def verify_init(init: Init, *, digests: bool) -> None:
    """Raises CheckpointError naming the first weight file that is missing, of another size, or (`digests`) changed."""
    for name, info in init.files.items():
        path = init.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; import the model again")
        if path.stat().st_size != info.size or (digests and digest(path) != info.sha256):
            raise CheckpointError(f"{path} has changed since it was imported: its sha256 is not the one in {INIT_FILE}")


def load_pieces(folder: Path, pieces: Sequence["Piece"]) -> None:
    """Fill `pieces` (named `params/NAME`) from the weights in `folder`, reading only their elements.

    Numbers are converted to the pieces' precision. Raises CheckpointError for a tensor that is missing or of another
    size.
    """
    from thinwire.hub.shards import ShardReader

    reader = ShardReader(folder)
    for piece in pieces:
        name = piece.name.removeprefix("params/")
        if reader.shape(name) != piece.shape:
            raise CheckpointError(f"{folder}: {name!r} is {reader.shape(name)}, this model's is {piece.shape}")
        piece.tensor.copy_(reader.elements(name, piece.offset, piece.tensor.numel()))
