"""The tokenizer of a run as the files that `transformers.AutoTokenizer` reads, and what ends a text. No torch.

The tokenizer's own end of text stands in the tokenizer's files, in config.json and in generation_config.json; the latter
also stops at what ends an answer, if the corpus is of conversations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thinwire.data.corpus import Corpus, DataConfig, exists
from thinwire.data.tokenizer import CONFIG as TOKENIZER_CONFIG
from thinwire.data.tokenizer import END_OF_TEXT, SPECIAL, ByteTokenizer, FileTokenizer, load_file
from thinwire.hub.files import CONFIG, GENERATION, TOKENIZER, TOKENIZER_FILES, copy_files, read_json, write_json

_TALKS = 64
"""Answers that are looked at to see what ends one."""


@dataclass(frozen=True)
class EndTokens:
    """Ids that end something, and whether ids that came with the weights mean the same in this tokenizer."""

    text: int
    turns: tuple[int, ...]
    same: bool | None
    """None: the weights came without a tokenizer."""


def write_tokenizer(folder: Path, hub: Path, data: DataConfig) -> EndTokens | None:
    """Write the run's tokenizer into `folder`; None if there is none.

    It is that of the corpus, with the files beside it: they know of chat templates and special tokens. Those in `hub`, which
    came with the weights, are taken where the corpus is gone or has the same tokenizer without them. Raises DataError if
    there is neither a corpus nor a tokenizer in `hub`, or one of the files cannot be read.
    """
    source, same = _source(hub, data)
    if source is not None:
        copy_files(source, folder, TOKENIZER_FILES)
        tokenizer = load_file(folder / TOKENIZER)
        _state_end(folder, _text_of(tokenizer))
        return EndTokens(tokenizer.eot, _turn_ends(data, tokenizer), same)
    made = Corpus.open(data).tokenizer
    if made is None:
        return None
    assert isinstance(made, ByteTokenizer)  # every other one has its file in the corpus
    _write_bytes(folder)
    _state_end(folder, END_OF_TEXT)
    return EndTokens(made.eot, (), False)


def _source(hub: Path, data: DataConfig) -> tuple[Path | None, bool | None]:
    """The folder whose tokenizer files are the run's, and whether its vocabulary is that of the weights' tokenizer."""
    came = load_file(hub / TOKENIZER) if (hub / TOKENIZER).is_file() else None
    if not (data.path / TOKENIZER).is_file():
        return (None, None) if came is None else (hub, True)
    same = None if came is None else came.vocabulary == load_file(data.path / TOKENIZER).vocabulary
    return (hub if same and not (data.path / TOKENIZER_CONFIG).is_file() else data.path), same


def _state_end(folder: Path, end: str) -> None:
    """Name the end of text in the tokenizer's own files."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        made = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / TOKENIZER_CONFIG, made)
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL):
        stated = read_json(path) if path.is_file() else None
        token = None if stated is None else stated.get("eos_token")
        if stated is not None and end not in (token, token.get("content") if isinstance(token, dict) else None):
            write_json(path, {**stated, "eos_token": end})


def _text_of(tokenizer: FileTokenizer) -> str:
    return next(text for text, number in tokenizer.vocabulary.items() if number == tokenizer.eot)


def _turn_ends(data: DataConfig, tokenizer: FileTokenizer) -> tuple[int, ...]:
    """The special tokens with which answers end, seen in the first ones of a corpus of conversations."""
    train = Corpus.open(data).train if exists(data) else None
    if train is None or train.answers is None:
        return ()
    learned = np.flatnonzero(np.asarray(train.answers[: 1 << 20]))
    lasts = learned[np.flatnonzero(np.diff(learned, append=-1) != 1)][:_TALKS]
    found: dict[int, None] = {}
    for last in lasts:
        run = [int(token) for token in train.stream[max(0, last - 3) : last + 1] if int(token) in tokenizer.special_ids]
        found |= dict.fromkeys(run[-1:])
    return tuple(found)


def write_ends(folder: Path, hub: Path, ends: EndTokens | None) -> None:
    """Put the ends into config.json, if `folder` has one, and into a generation_config.json.

    Sampling settings, and ids that still mean the same, stay as they came.
    """
    path = folder / CONFIG
    config = read_json(path) if path.is_file() else {}
    source = next((one / GENERATION for one in (hub, folder) if (one / GENERATION).is_file()), None)
    ids = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    generation = {**ids, **(read_json(source) if source is not None else {"_from_model_config": True})}
    if ends is not None:
        old = _listed(config.get("eos_token_id")) if ends.same else []
        config["eos_token_id"] = _one(old if ends.text in old else [ends.text])
        stated = _listed(generation.get("eos_token_id", old)) if ends.same else []
        first = [] if ends.text in stated else [ends.text]
        generation["eos_token_id"] = _one(
            [*first, *stated, *(turn for turn in ends.turns if turn not in [*first, *stated])]
        )
    if path.is_file():
        write_json(path, config)
        write_json(folder / GENERATION, {"eos_token_id": config.get("eos_token_id"), **generation})


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _one(ids: list[int]) -> int | list[int] | None:
    return ids if len(ids) > 1 else ids[0] if ids else None


def _write_bytes(folder: Path) -> None:
    """Bytes as byte-level BPE without merges: id = byte, then the end of text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    library = tokenizers.Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    library.save(str(folder / TOKENIZER))
