"""`[data]` of a run file. No torch, no numpy."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from thinwire.config import Frozen


class DataConfig(Frozen):
    """Which token files a run reads, and how to make them on first use if `sources` is given."""

    path: Path
    """A folder made by `thinwire data prepare`, or the prefix of a Megatron indexed dataset (PREFIX.bin, PREFIX.idx)."""
    heldout: Path | None = None
    """Prefix of a second indexed dataset to validate on; a prepared folder has its own."""
    cross_documents: bool | None = None
    """False: attention stays inside a document, positions start again at 0, and no token predicts the next document.

    Default: true; of conversations false, which never attend to one another.
    """
    sources: tuple[str, ...] = ()
    """If `path` is not there yet, it is prepared from these: files, folders, `stdlib`, or `hf:NAME[:CONFIG[:SPLIT]]`."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:SIZE` or the path of a tokenizer.json; used when `path` is prepared."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    field: str = "text"
    """Field of JSON rows, or column of parquet and of `hf:` data sets, that holds the text."""
    special_tokens: bool = False
    """True: special tokens spelled out in a text, such as <|endoftext|>, become special; else they are ordinary text."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
