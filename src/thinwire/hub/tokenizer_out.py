"""The tokenizer of a run as the files that `transformers.AutoTokenizer` reads. No torch."""

from pathlib import Path

from thinwire.data.config import DataConfig
from thinwire.data.corpus import Corpus
from thinwire.data.tokenizer import CONFIG, END_OF_TEXT, ByteTokenizer, FileTokenizer, Tokenizer, load_file
from thinwire.hub.files import TOKENIZER, TOKENIZER_FILES, copy_files, write_json


def write_tokenizer(folder: Path, hub: Path, data: DataConfig) -> int | None:
    """Write the run's tokenizer into `folder`; the id that ends a text, or None if there is no tokenizer.

    The files in `hub`, which came with the weights, are taken if the corpus was made with that tokenizer: they know of
    chat templates and special tokens. Raises DataError if there is neither a corpus nor a tokenizer in `hub`.
    """
    kept = load_file(hub / TOKENIZER) if (hub / TOKENIZER).is_file() else None
    if kept is not None and not _other(kept, data):
        copy_files(hub, folder, TOKENIZER_FILES)
        return kept.eot
    tokenizer = Corpus.open(data).tokenizer
    if tokenizer is None:
        return None
    if isinstance(tokenizer, ByteTokenizer):
        _write_bytes(folder)
        end = END_OF_TEXT
    else:
        tokenizer.save(folder)
        end = _text_of(tokenizer)
    write_json(
        folder / CONFIG,
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False},
    )
    return tokenizer.eot


def _other(kept: FileTokenizer, data: DataConfig) -> bool:
    """Whether the corpus, if it is still there, was made with another tokenizer than the one that came with the weights."""
    file = data.path / TOKENIZER
    return file.is_file() and load_file(file).vocabulary != kept.vocabulary


def _text_of(tokenizer: Tokenizer) -> str:
    assert isinstance(tokenizer, FileTokenizer)
    return next(text for text, number in tokenizer.vocabulary.items() if number == tokenizer.eot)


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
