"""A corpus on disk: a prepared folder (two splits, a tokenizer, a manifest) or a bare Megatron dataset."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.data.config import DataConfig
from thinwire.data.indexed import IndexedTokens, paths_of
from thinwire.data.tokenizer import ByteTokenizer, TokenBytes, Tokenizer, load_file
from thinwire.errors import DataError

MANIFEST, FORMAT = "corpus.json", 1
PREFIXES = ("train", "heldout")
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """Token streams to train and validate on. Without a tokenizer neither text nor bits per byte can be shown."""

    train: IndexedTokens
    heldout: IndexedTokens | None
    tokenizer: Tokenizer | None
    digest: str
    """Identity of the training tokens and the tokenizer."""
    cross_documents: bool
    """Whether attention and predictions cross from one document to the next."""

    @property
    def conversations(self) -> bool:
        """Whether it was made of conversations, of which only the answers are learned."""
        return self.train.answers is not None

    @property
    def vocab_size(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> TokenBytes | None:
        return None if self.tokenizer is None else self.tokenizer.token_bytes()

    @staticmethod
    def open(config: DataConfig) -> "Corpus":
        """Raises DataError if there is no corpus at `config.path`, or it is damaged."""
        if (config.path / MANIFEST).is_file():
            return _open_folder(config)
        if config.path.is_dir():
            raise DataError(f"{config.path} holds no {MANIFEST}: it was not made by `thinwire data prepare`")
        if not paths_of(config.path)[1].is_file():
            raise DataError(
                f"there is no corpus at {config.path}; make it with `thinwire data prepare SOURCE -o {config.path}`, or "
                f"set data.sources"
            )
        return _open_prefix(config)


def exists(config: DataConfig) -> bool:
    """Whether anything is at `config.path` that `Corpus.open` should judge."""
    return config.path.exists() or paths_of(config.path)[1].exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises DataError if it is not one that this version reads."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{folder / MANIFEST} is not of format {FORMAT}; prepare the corpus anew with this version")
    return manifest


def _open_folder(config: DataConfig) -> Corpus:
    manifest = read_manifest(config.path)
    splits = {}
    for name in PREFIXES:
        splits[name] = IndexedTokens(config.path / name)
        expected = manifest["splits"][name]["tokens"]
        if splits[name].tokens != expected:
            raise DataError(
                f"{config.path / name}.bin holds {splits[name].tokens:,} tokens, its manifest says {expected:,}"
            )
    file = manifest["tokenizer"]["file"]
    tokenizer: Tokenizer = ByteTokenizer() if file == "bytes" else load_file(config.path / file)
    if tokenizer.vocab_size != manifest["tokenizer"]["vocab_size"]:
        raise DataError(
            f"{config.path / file} has {tokenizer.vocab_size} ids, the corpus was made with "
            f"{manifest['tokenizer']['vocab_size']}; prepare it anew"
        )
    identity = json.dumps([manifest["splits"]["train"], manifest["tokenizer"]], sort_keys=True)
    heldout = IndexedTokens(config.heldout) if config.heldout else splits["heldout"]
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Corpus(splits["train"], heldout, tokenizer, digest, _crossing(config, splits["train"]))


def _open_prefix(config: DataConfig) -> Corpus:
    heldout = IndexedTokens(config.heldout) if config.heldout else None
    train = IndexedTokens(config.path)
    return Corpus(train, heldout, None, _prefix_digest(config.path), _crossing(config, train))


def _crossing(config: DataConfig, train: IndexedTokens) -> bool:
    if train.answers is not None and config.cross_documents:
        raise DataError(
            f"data.cross_documents = true, but {config.path} was made of conversations, which never attend to one another; "
            f"leave it out"
        )
    return train.answers is None and config.cross_documents is not False


def _prefix_digest(prefix: Path) -> str:
    """Of the whole index and the ends of the tokens: a corpus of terabytes is not read just to know which it is."""
    tokens_path, index_path = paths_of(prefix)
    digest = hashlib.sha256(index_path.read_bytes())
    with tokens_path.open("rb") as tokens:
        digest.update(tokens.read(_SAMPLE_BYTES))
        tokens.seek(max(0, tokens_path.stat().st_size - _SAMPLE_BYTES))
        digest.update(tokens.read(_SAMPLE_BYTES))
    return digest.hexdigest()
