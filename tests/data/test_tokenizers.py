"""Tokenizers of every kind: bytes that tokens stand for, special tokens that a text spells out, lines without end."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from thinwire.data.indexed import IndexedTokens, IndexedWriter
from thinwire.data.loader import evaluation_batches
from thinwire.data.notes import notes
from thinwire.data.prepare import Options, prepare
from thinwire.data.tokenizer import END_OF_TEXT, ByteTokenizer, FileTokenizer, train_bpe
from thinwire.errors import DataError
from thinwire.evaluate.scoring import _bytes_scored

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPACE = "\u2581"


def byte_level(*added: str) -> Tokenizer:
    library = train_bpe(300, ["the quick brown fox jumps over the lazy dog " * 20])._library
    library.add_tokens([AddedToken(token, special=False) for token in added])
    return library


def byte_fallback(*, known_space: bool, start: Callable[[], normalizers.Normalizer] | None = None) -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *([SPACE] if known_space else [])]:
        vocabulary[token] = len(vocabulary)
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    replaced = normalizers.Replace(" ", SPACE)
    library.normalizer = normalizers.Sequence([start(), replaced]) if start else replaced
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE, " ")])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), (SPACE, -2.0), *((letter, -3.0) for letter in LETTERS + "</>|.")]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<unk>", "</s>"])
    return library


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "added words": lambda: byte_level("안녕하세요", "größer", "the quick"),
    "byte fallback": lambda: byte_fallback(known_space=True),
    "space by byte fallback": lambda: byte_fallback(known_space=False),
    "space before": lambda: byte_fallback(known_space=True, start=lambda: normalizers.Prepend(SPACE)),
    "space before by byte fallback": lambda: byte_fallback(known_space=False, start=lambda: normalizers.Prepend(SPACE)),
    "unigram": unigram,
}
TEXTS = [
    "the fox is here",
    "안녕하세요 größer fox",
    "x",
    "größer  das\nandere \t größer",
    "a" * 40 + "日本語 and \U0001f600 ▂",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_add_up_to_the_bytes_of_the_text(kind: str) -> None:
    tokenizer = FileTokenizer(KINDS[kind](), kind)
    texts = [text for text in TEXTS if kind != "unigram" or set(text) <= set(LETTERS + " ")]
    for text in texts:
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
    stream = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot]]
    assert tokenizer.token_bytes()[stream].sum() == sum(len(text.encode()) for text in texts)


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters=SPACE), max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_text_that_is_kept_as_it_is_has_other_bytes(text: str) -> None:
    for kind in ("byte level", "added words", "byte fallback", "space by byte fallback"):
        tokenizer = CACHED[kind]
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


CACHED = {kind: FileTokenizer(make(), kind) for kind, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_validation_counts_the_bytes_of_the_text_however_it_is_cut(tmp_path: Path, kind: str) -> None:
    tokenizer = CACHED[kind]
    texts = ["the fox is here", "so are the others", "and a third one"]
    documents = [np.array([*tokenizer.encode(text), tokenizer.eot]) for text in texts]
    writer = IndexedWriter(tmp_path / "d", tokenizer.vocab_size)
    writer.add(np.concatenate(documents), np.array([one.size for one in documents], np.int32))
    writer.close()
    split = IndexedTokens(tmp_path / "d")
    first = int(tokenizer.token_bytes()[split.stream[:1]][0])
    total = sum(len(text) for text in texts) - first
    lengths = (4, 11, 500) if "space by" not in kind and "before by" not in kind else (500,)
    for length in lengths:
        batches = list(evaluation_batches(split, length, 2))
        assert sum(_bytes_scored(batch, tokenizer.token_bytes()) for batch in batches) == total


SPELLED = "A page says that <|endoftext|> ends a document, or </s> does."


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_a_text_spells_out_are_ordinary_text_unless_asked_for(kind: str) -> None:
    tokenizer = CACHED[kind]
    end = "</s>" if tokenizer.eot == tokenizer.special.get("</s>") else END_OF_TEXT
    assert tokenizer.spells_special(SPELLED) and not tokenizer.spells_special("A page.")
    plain, special = tokenizer.encode(SPELLED), tokenizer.encode(SPELLED, special=True)
    assert not {tokenizer.special[name] for name in (end,)} & set(plain)
    assert special.count(tokenizer.eot) == 1
    ids, offsets = tokenizer.encode_with_offsets(SPELLED)
    assert ids == plain
    assert offsets == sorted(offsets) and offsets[-1][1] == len(SPELLED)
    if kind != "unigram":  # it has neither capitals nor commas
        assert tokenizer.decode(plain).strip() == SPELLED
    if kind != "unigram" and not tokenizer.token_bytes().before:  # else a space is written behind special tokens too
        assert tokenizer.decode(special).strip() == SPELLED.replace(end, "")


def test_prepare_says_that_texts_spell_out_special_tokens(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "l.txt").write_text(SPELLED * 50)
    options = Options((str(tmp_path / "l.txt"),), str(tmp_path / "tokenizer.json"), validation_fraction=0.0)
    for special, ends in ((False, 1), (True, 51)):
        out = tmp_path / str(special)
        manifest = prepare(replace(options, special_tokens=special), out, workers=1)
        assert int((np.fromfile(out / "train.bin", np.uint16) == 0).sum()) == ends
        assert any("spell out special tokens" in note for note in notes(manifest))


def test_what_a_vocabulary_cannot_write_is_told(tmp_path: Path) -> None:
    unigram().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "l.txt").write_text("ab ÄÖ c")
    options = Options((str(tmp_path / "l.txt"),), str(tmp_path / "tokenizer.json"), validation_fraction=0.0)
    lost, changed = notes(prepare(options, tmp_path / "out", workers=1))
    assert lost == "1 tokens are unknown to the tokenizer's vocabulary, and what they stood for is lost"
    assert changed.startswith("the tokens stand for 5 of 9 bytes")


def _reference(size: int, text: str) -> dict[str, int]:
    """What the trainer makes of whole words, however long."""
    from tokenizers import trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    library.train_from_iterator(text.splitlines(keepends=True), trainer=trainer)
    return dict(library.get_vocab())


def test_words_of_up_to_a_thousand_bytes_train_the_same_vocabulary() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcde") for _ in range(draw.choice([3, 5, 400, 998]))) for _ in range(60)]
    text = " ".join(words)
    assert train_bpe(400, [text]).vocabulary == _reference(400, text)


def test_a_line_of_megabytes_without_a_space_trains_in_linear_time() -> None:
    draw = random.Random(0)
    tokenizer = train_bpe(400, ["".join(draw.choice("abcdefghij") for _ in range(600_000))])
    assert tokenizer.vocab_size == 400  # whole, this line would take the trainer minutes: 14 s for 160,000 letters


def test_plain_bytes_have_no_special_spelling() -> None:
    assert not ByteTokenizer().spells_special(SPELLED)
    assert ByteTokenizer().token_bytes()[[*b"abc", 256]].sum() == 3


def test_an_id_that_no_model_has_a_row_for_is_told() -> None:
    library = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1, "b": 4_000_000_000}, merges=[]))
    with pytest.raises(DataError, match=r"it has a token of id 4,000,000,000; ids below 4,194,304 are read"):
        FileTokenizer(library, "it")
