"""The small files of a Hugging Face folder: config, tokenizer, chat template, generation config. No torch."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from thinwire import config
from thinwire.data.tokenizer import BESIDE
from thinwire.errors import ConfigError
from thinwire.units import parse_bytes

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, *BESIDE)
SIDE_FILES = (CONFIG, GENERATION, *TOKENIZER_FILES)

Precision = Literal["fp32", "bf16", "fp16"]


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError if the file is missing or holds no JSON object."""
    way_out = "give a folder that save_pretrained or `hf download` made"
    if not os.path.lexists(path):
        raise ConfigError(f"{path} does not exist; {way_out}")
    tree = config.read_json(path, way_out=way_out)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no JSON object; {way_out}")
    return tree


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: Sequence[str]) -> list[str]:
    """Copy those of `names` that are there; their names."""
    there = [name for name in names if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in there:
        shutil.copyfile(source / name, target / name)
    return there


def same_mode(folder: Path) -> None:
    """Give every file the mode of one that is simply opened (0644 under the usual umask); safetensors makes its own 0600."""
    plain = folder / ".mode"
    plain.touch()
    mode = plain.stat().st_mode & 0o777
    plain.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def shard_bytes(text: str) -> int:
    """The size of a shard as a person writes it. Raises ConfigError."""
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--shard-size: {error}") from None
    if size < 1:
        raise ConfigError(f"--shard-size {text} is nothing; write for example '5 GB'")
    return size


def precision_of(text: str) -> Precision:
    """The precision to write weights in, as a person names it. Raises ConfigError."""
    for known in get_args(Precision):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"--precision {text} is unknown; there are {', '.join(get_args(Precision))}")
