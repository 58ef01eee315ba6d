"""Text to ids and back: plain bytes, or any Hugging Face `tokenizers` file, or byte-level BPE trained on the spot.

Every tokenizer has an end-of-text id that follows each document, and knows how many UTF-8 bytes its tokens stand for, so
that bits per byte can be computed exactly. A special token that a text merely spells out is ordinary text, unless it is
asked for: a page about tokenizers must not end in the middle.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import DataError
from thinwire.units import whole_number

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_SPACE = "\u2581"
"""How SentencePiece writes a space."""
_LONGEST_WORD = 1000
_FEWEST_IDS, _MOST_IDS = 257, 2**22
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
BESIDE = (
    CONFIG, SPECIAL, "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""Files beside a tokenizer.json that belong to it: its own end of text and chat template are in them."""
_BYTE_TOKEN = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")


@dataclass(frozen=True)
class TokenBytes:
    """`bytes[ids]`: how many UTF-8 bytes of text each of the consecutive tokens `ids` stands for; 0 for special ones.

    Along the last axis, which begins with a document. Sums are exact wherever a tokenizer loses nothing of the text.
    """

    table: NDArray[np.int64]
    """(vocab_size,) by id alone."""
    eot: int
    before: int = 0
    """Bytes of a document's first token that the tokenizer added."""
    space: tuple[int, ...] = ()
    """Ids of single bytes that together write one space; empty if a token of its own does."""

    def __getitem__(self, ids: Any) -> NDArray[np.int64]:
        ids = np.asarray(ids, dtype=np.int64)
        counts: NDArray[np.int64] = self.table[ids]
        if self.before and ids.size:
            first = np.ones(ids.shape, bool)
            first[..., 1:] = ids[..., :-1] == self.eot
            counts = np.where(first, np.maximum(counts - self.before, 0), counts)
        if self.space and ids.shape[-1:] >= (len(self.space),):
            last = len(self.space) - 1
            width = ids.shape[-1] - last
            ends = np.logical_and.reduce([ids[..., k : k + width] == one for k, one in enumerate(self.space)])
            counts[..., last:] -= last * ends
        return counts


class Tokenizer(Protocol):
    """What the rest of thinwire needs of one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """`special`: special tokens that the text spells out become those, not ordinary text."""
        ...

    def encode_many(self, texts: Sequence[str], *, special: bool = False) -> list[NDArray[np.int64]]: ...

    @property
    def unknown(self) -> int | None:
        """The id of what the vocabulary cannot write; None if it can write everything."""
        ...

    def spells_special(self, text: str) -> bool:
        """Whether the text spells out a special token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self) -> TokenBytes:
        """How many bytes of text tokens stand for."""
        ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """256 bytes and the end of text. Nothing to train, nothing to store."""

    vocab_size, eot, unknown = 257, 256, None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_many(self, texts: Sequence[str], *, special: bool = False) -> list[NDArray[np.int64]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def spells_special(self, text: str) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> TokenBytes:
        return TokenBytes(np.array([1] * 256 + [0], dtype=np.int64), self.eot)

    def save(self, folder: Path) -> None:
        """Nothing: the folder's manifest names it."""


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face tokenizers library, without its settings for batches of examples.

    What ends a text is said in `folder`, by the files beside it; without them it is the first of the usual names.
    """

    def __init__(self, library: Any, name: str, folder: Path | None = None) -> None:
        library.no_truncation()
        library.no_padding()
        self._library, self._folder = library, folder
        named = [*(stated_ends(folder) if folder is not None else ()), *_END_NAMES]
        ends = [library.token_to_id(end) for end in named if library.token_to_id(end) is not None]
        if not ends:
            raise DataError(
                f'{name} has no end-of-text token (one of {", ".join(named)}); name it as "eos_token" in a {CONFIG} beside '
                f"it"
            )
        if self.vocab_size > _MOST_IDS:
            raise DataError(
                f"{name} has a token of id {self.vocab_size - 1:,}; ids below {_MOST_IDS:,} are read: number them anew"
            )
        self.eot = int(ends[0])
        added = library.get_added_tokens_decoder().items()
        self.special = {str(token.content): int(i) for i, token in added if token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        # The longest first, as one may begin like another.
        self.spelling = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.special_ids = frozenset(self.special.values())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, special ones included."""
        return dict(self._library.get_vocab(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        return 1 + max(self.vocabulary.values())

    @property
    def unknown(self) -> int | None:
        """The id of what the vocabulary cannot write; None if it can write everything."""
        if "ByteLevel" in str(self._library.decoder):
            return None
        name = getattr(self._library.model, "unk_token", None) or "<unk>"
        found = self._library.token_to_id(str(name))
        return None if found is None else int(found)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [int(i) for i in self.encode_many([text], special=special)[0]]

    def encode_with_offsets(self, text: str, *, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the positions in `text` of its first character and behind its last."""
        self._library.encode_special_tokens = not special
        cuts, coded = [0], [self._library.encode(text, add_special_tokens=False)]
        if not special and self._spelled_out(text, coded[0].ids):
            cuts += [found.start() + 1 for found in self.spelling.finditer(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]
            coded = [self._library.encode(piece, add_special_tokens=False) for piece in pieces]
        ids = [int(i) for one in coded for i in one.ids]
        return ids, [(cut + a, cut + b) for cut, one in zip(cuts, coded, strict=True) for a, b in one.offsets]

    def encode_many(self, texts: Sequence[str], *, special: bool = False) -> list[NDArray[np.int64]]:
        self._library.encode_special_tokens = not special
        coded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        made = [np.array(one.ids, dtype=np.int64) for one in coded]
        for place, text in enumerate(() if special else texts):
            if self._spelled_out(text, made[place]):
                made[place] = np.array(self.encode_with_offsets(text)[0], dtype=np.int64)
        return made

    def _spelled_out(self, text: str, ids: Sequence[int] | NDArray[np.int64]) -> bool:
        """Whether the model itself finds a special token that `text` spells out among its words, as Unigram does."""
        spelled = {self.special[found] for found in self.spelling.findall(text)}
        return bool(spelled) and bool(np.isin(ids, list(spelled)).any())

    def spells_special(self, text: str) -> bool:
        return self.spelling.search(text) is not None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        table = np.zeros(self.vocab_size, dtype=np.int64)
        added = {token.content for token in self._library.get_added_tokens_decoder().values()}
        decoder = str(self._library.decoder)
        for token, i in self.vocabulary.items():
            if i not in self.special_ids:
                table[i] = len(token.encode("utf-8")) if token in added else _piece_bytes(token, decoder)
        bare = TokenBytes(table, self.eot, space=self._written_space(decoder))
        # What a tokenizer writes before a text that does not begin with a space stands for nothing of it.
        return replace(bare, before=max(0, int(bare[self.encode("a")].sum()) - 1))

    def _written_space(self, decoder: str) -> tuple[int, ...]:
        """The bytes that write a space where the vocabulary has no token for it."""
        if "ByteFallback" not in decoder or _SPACE not in decoder or self._library.token_to_id(_SPACE) is not None:
            return ()
        ids = [self._library.token_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode("utf-8")]
        return () if None in ids else tuple(ids)

    def token_bytes(self) -> TokenBytes:
        return self._token_bytes

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


def _piece_bytes(token: str, decoder: str) -> int:
    """Bytes of a token of the model's own vocabulary, by how the decoder writes it."""
    if "ByteLevel" in decoder:
        return len(token)
    if "ByteFallback" in decoder and _BYTE_TOKEN.match(token):
        return 1
    if "WordPiece" in decoder:
        token = token.removeprefix("##")
    return len((token.replace(_SPACE, " ") if _SPACE in decoder else token).encode("utf-8"))


def load_file(path: Path, *, otherwise: str = "bytes, bpe:SIZE or the path of a tokenizer.json") -> FileTokenizer:
    """Read a tokenizer.json. Raises DataError if it is missing, with what to give `otherwise`, or not one."""
    import tokenizers

    try:
        there = path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        raise DataError(f"there is no tokenizer file {path}; give {otherwise}")
    try:
        return FileTokenizer(tokenizers.Tokenizer.from_file(str(path)), str(path), path.parent)
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from None


def train_bpe(size: int, texts: Iterable[str]) -> FileTokenizer:
    """Byte-level BPE (GPT-2's kind) of `size` ids, the end of text among them, trained on `texts`."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # A merge moves all that follows it in its word: a line without spaces would take time quadratic in its length.
    pieces = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST_WORD}}}"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_lines(texts), trainer=trainer)
    library.pre_tokenizer = words
    return FileTokenizer(library, f"bpe:{size}")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Documents in pieces small enough for the trainer to share among threads."""
    for text in texts:
        yield from text.splitlines(keepends=True)


def parse_choice(choice: str) -> int | Path | None:
    """`bytes` -> None, `bpe:4096` -> 4096, anything else -> a path. Raises DataError for a size out of range."""
    if choice == "bytes":
        return None
    if choice.startswith("bpe:"):
        size = whole_number(choice[4:], most=_MOST_IDS)
        if size is None or size < _FEWEST_IDS:
            raise DataError(
                f"--tokenizer {choice[:40]} has no size from {_FEWEST_IDS} (256 bytes and the end of text) to "
                f"{_MOST_IDS:,}; write for example bpe:4096"
            )
        return size
    return Path(choice)
