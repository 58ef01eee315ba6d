"""A corpus on disk: a prepared folder (two splits, a tokenizer, a manifest) or a bare Megatron dataset; `[data]` names it.

On first use it is made once: of all processes that see its folder one makes it, the others wait. They meet at a lock in a
hidden folder beside it. Where hosts do not see each other's disks there is a lock on each, and each makes its own. Whoever
has waited in vain says so instead of trying in turn: what failed once would fail again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thinwire.config import Frozen, explain, read_json
from thinwire.data.indexed import IndexedTokens, paths_of
from thinwire.data.tokenizer import ByteTokenizer, TokenBytes, Tokenizer, load_file
from thinwire.errors import DataError, HeldError, StopAsked
from thinwire.files.locks import Lock, hold
from thinwire.units import SYSTEM_CLOCK, SystemClock

MANIFEST, FORMAT = "corpus.json", 1
PREFIXES = ("train", "heldout")
_SAMPLE_BYTES = 1 << 20


class _ManifestPart(BaseModel):
    """A part of the manifest: what is read of it; more may stand there."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Split(_ManifestPart):
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)


class _Splits(_ManifestPart):
    train: _Split
    heldout: _Split


class _Tokens(_ManifestPart):
    file: str
    vocab_size: int = Field(ge=1)


class _Manifest(_ManifestPart):
    format: Literal[1]
    tokenizer: _Tokens
    splits: _Splits


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
    path, way_out = folder / MANIFEST, "prepare the corpus anew with `thinwire data prepare`"
    manifest = read_json(path, error=DataError, way_out=way_out)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not of format {FORMAT}; {way_out}")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise DataError(f"{path}: {explain(error)}; {way_out}") from None
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


_LOOK_S, _SETTLE_S = 0.2, 3.0
"""Between two looks; for a file server to show what another host has just written."""


def make_once(
    out: Path,
    make: Callable[[], object],
    *,
    there: Callable[[], bool],
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    clock: SystemClock = SYSTEM_CLOCK,
) -> None:
    """Return when `there()`: made by this process through `make`, or by another that was waited for.

    `say` is told once for whom this process waits. Raises what `make` raises, StopAsked if `stopped()` meanwhile, and
    DataError if the one that was waited for ended without it, or no lock can be made beside `out`.
    """
    meeting, waited = out.with_name(f".{out.name}.first-use"), ""
    while not there():
        if stopped():
            raise _stopped(out)
        try:
            meeting.mkdir(parents=True, exist_ok=True)
            lock = hold(meeting, clock=clock)
        except HeldError as error:
            if not waited:  # later holders only look whether it is there
                waited = error.holder
                say(f"waiting for {waited}, which makes {out}")
            clock.sleep(_LOOK_S)
            continue
        except FileNotFoundError:  # its holder is done, and has removed it
            continue
        except OSError as error:
            raise DataError(
                f"{out} cannot be made: {error.strerror or error}; choose another with --set data.path=PATH"
            ) from None
        with _held(lock, meeting):
            if not waited:
                _make(out, make, there, stopped)
                return
        if not _shows(out, there, clock):
            raise DataError(f"{waited} has ended without making {out}; see what it said, and start again")


def _make(out: Path, make: Callable[[], object], there: Callable[[], bool], stopped: Callable[[], bool]) -> None:
    if there():
        return
    try:
        make()
    except Exception:
        if stopped():  # the signal has reached those that help too
            raise _stopped(out) from None
        raise


def _shows(out: Path, there: Callable[[], bool], clock: SystemClock) -> bool:
    """Whether it is there, once the file server has been asked anew."""
    end_s = clock.now() + _SETTLE_S
    while not there() and clock.now() < end_s:
        list(out.parent.iterdir())
        clock.sleep(_LOOK_S)
    return there()


@contextmanager
def _held(lock: Lock, folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another waits inside
            folder.rmdir()


def _stopped(out: Path) -> StopAsked:
    return StopAsked(f"stopped before {out} was made; the same command starts again")
