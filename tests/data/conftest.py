"""A tokenizer with a chat template, for all tests of conversations."""

import json
from pathlib import Path

import pytest

from runs import make_text
from talks import TEMPLATE
from thinwire.data.prepare import Options, prepare


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as INIT/hub: byte-level BPE with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare(Options((str(make_text(folder / "text")),), "bpe:300"), folder / "corpus", workers=1)
    (folder / "corpus" / "tokenizer.json").rename(folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
