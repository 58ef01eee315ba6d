"""Text to ids and back: plain bytes, or any Hugging Face `tokenizers` file, or byte-level BPE trained on the spot.

Every tokenizer has an end-of-text id that follows each document, and knows how many UTF-8 bytes each id stands for, so
that bits per byte can be computed exactly.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
BESIDE = (
    CONFIG, SPECIAL, "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""Files beside a tokenizer.json that belong to it: its own end of text and chat template are in them."""
_BYTE_TOKEN = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")


class Tokenizer(Protocol):
    """What the rest of thinwire needs of one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self) -> NDArray[np.int64]:
        """(vocab_size,): UTF-8 bytes each id stands for; 0 for special ids."""
        ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """256 bytes and the end of text. Nothing to train, nothing to store."""

    vocab_size, eot = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Nothing: the folder's manifest names it."""


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face tokenizers library.

    What ends a text is said in `folder`, by the files beside it; without them it is the first of the usual names.
    """

    def __init__(self, library: Any, name: str, folder: Path | None = None) -> None:
        self._library, self._folder = library, folder
        named = [*(stated_ends(folder) if folder is not None else ()), *_END_NAMES]
        ends = [library.token_to_id(end) for end in named if library.token_to_id(end) is not None]
        if not ends:
            raise DataError(
                f'{name} has no end-of-text token (one of {", ".join(named)}); name it as "eos_token" in a {CONFIG} beside '
                f"it"
            )
        self.eot = int(ends[0])

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, special ones included."""
        return dict(self._library.get_vocab(with_added_tokens=True))

    @property
    def special(self) -> set[int]:
        """Ids that stand for no text."""
        return {i for i, token in self._library.get_added_tokens_decoder().items() if token.special}

    @property
    def vocab_size(self) -> int:
        return 1 + max(self.vocabulary.values())

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the position in `text` of its first character."""
        coded = self._library.encode(text, add_special_tokens=False)
        return list(coded.ids), [start for start, _ in coded.offsets]

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        coded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in coded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> NDArray[np.int64]:
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        special = self.special
        byte_level = "ByteLevel" in str(self._library.decoder)
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            if i not in special:
                counts[i] = len(token) if byte_level else _piece_bytes(token)
        return counts

    def save(self, folder: Path) -> None:
        """With the files that stand beside it, so that the copy ends texts, and writes chats, as this one does."""
        self._library.save(str(folder / "tokenizer.json"))
        beside = [] if self._folder is None else [self._folder / name for name in BESIDE]
        for path in beside:
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def stated_ends(folder: Path) -> list[str]:
    """The `eos_token` of the tokenizer's own files, as text. Raises DataError if one of them cannot be read."""
    ends = []
    for path in (folder / CONFIG, folder / SPECIAL):
        if path.is_file():
            try:
                tree = json.loads(path.read_text(encoding="utf-8"))
                end = tree.get("eos_token")
            except (OSError, ValueError, RecursionError, AttributeError) as error:
                raise DataError(f"{path} cannot be read: {error}; mend it, or take it away") from None
            end = end.get("content") if isinstance(end, dict) else end
            ends += [end] if isinstance(end, str) else []
    return ends


def _piece_bytes(token: str) -> int:
    """Bytes of a SentencePiece-style token: `<0x0A>` is one byte, the low line block is a space."""
    return 1 if _BYTE_TOKEN.match(token) else len(token.replace("\u2581", " ").encode("utf-8"))


def load_file(path: Path) -> FileTokenizer:
    """Read a tokenizer.json. Raises DataError if it is missing or not one."""
    import tokenizers

    if not path.is_file():
        raise DataError(f"there is no tokenizer file {path}; give bytes, bpe:SIZE or the path of a tokenizer.json")
    try:
        return FileTokenizer(tokenizers.Tokenizer.from_file(str(path)), str(path), path.parent)
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from None


def train_bpe(size: int, texts: Iterable[str]) -> FileTokenizer:
    """Byte-level BPE (GPT-2's kind) of `size` ids, the end of text among them, trained on `texts`.

    Raises DataError for a size that leaves no room for the 256 bytes and the end of text.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < 257:
        raise DataError(f"bpe:{size} is too small: 256 bytes and the end of text need 257; try bpe:4096")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_lines(texts), trainer=trainer)
    return FileTokenizer(library, f"bpe:{size}")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Documents in pieces small enough for the trainer to share among threads."""
    for text in texts:
        yield from text.splitlines(keepends=True)


def parse_choice(choice: str) -> int | Path | None:
    """`bytes` -> None, `bpe:4096` -> 4096, anything else -> a path. Raises DataError for a size that is no number."""
    if choice == "bytes":
        return None
    if choice.startswith("bpe:"):
        if not choice[4:].isdigit():
            raise DataError(f"--tokenizer {choice} has no size; write for example bpe:4096")
        return int(choice[4:])
    return Path(choice)
